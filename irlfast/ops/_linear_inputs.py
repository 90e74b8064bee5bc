"""What the linear ops take: checks, autocast, one temperature a row."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.ops._dispatch import DTYPE_CODES, statistics_dtype
from irlfast.ops._token_stats_cpu import check_row_temperature


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the type that torch.nn.functional.linear would compute in."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def split_temperature(
    temperature: float | Tensor, rows_shape: torch.Size, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """A number and None, or 1 and one value a row [N] in the statistics' type."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    return 1.0, temperature.to(statistics_dtype(dtype)).expand(rows_shape).reshape(-1).contiguous()


def expand_temperature(temperature: float | Tensor, rows_shape: torch.Size) -> float | Tensor:
    """A number, or one value a row, as the references take it; ValueError for one that is out of range."""
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        check_row_temperature(temperature.expand(rows_shape))
    return temperature.expand(rows_shape)


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, memory_budget: int, chunk: int | None
) -> None:
    """TypeError or ValueError for inputs that do not fit together."""
    if hidden.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: hidden is {hidden.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{op}: labels are {labels.dtype}, expected integers; convert them with labels.long()")
    if hidden.ndim == 0 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels have shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])} for hidden "
            f"{tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}] for hidden "
            f"{tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) for this weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, hidden {hidden.dtype}; convert one, or use autocast")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, hidden on {hidden.device}; move one to the other")
    if memory_budget < 0:
        raise ValueError(f"{op}: memory_budget = {memory_budget} is negative; expected a number of bytes")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk = {chunk}; expected a positive number of columns")
