"""Handle a module that belongs to somebody else: its mode, its device, its parameters' names, its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each submodule's own mode again outside."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where the module is. `device` decides for a module without parameters, and must agree with one that has some."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.device("cpu" if device is None else device)
    if device is not None:
        wanted = torch.device(device)
        if wanted.type != parameter.device.type or wanted.index not in (None, parameter.device.index):
            raise ValueError(f"device = {wanted}, but the model is on {parameter.device}: move the model first")
    return parameter.device


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load all of `state_dict`, or nothing. A tied weight may be given under any one of its names."""
    own = model.state_dict(keep_vars=True)
    given = {own[name].data_ptr() for name in state_dict if name in own}
    missing = [name for name, value in own.items() if name not in state_dict and value.data_ptr() not in given]
    unknown = [name for name in state_dict if name not in own]
    if missing or unknown:
        raise ValueError(f"state_dict does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, value in state_dict.items():
        if value.shape != own[name].shape:
            raise ValueError(f"state_dict[{name!r}] has shape {list(value.shape)}, the model {list(own[name].shape)}")
    model.load_state_dict(dict(state_dict), strict=False)
