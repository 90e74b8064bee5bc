"""Low-rank adapters on a policy (Hu et al. 2021, through peft), and the reference that lies under them for free.

peft puts the adapters into the model's own layers. So whoever holds the bare model, such as an engine that samples from
it, runs the adapted policy from then on; and the same weights with the adapters switched off are the start policy, so a
reference needs no second copy of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irlfast.rollout.modules import eval_mode

from .config import LoraConfig

WEIGHTS = "adapter_model.safetensors"


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """`model` with adapters, which alone require a gradient; it starts as the model was, bit for bit.

    Raises:
        ImportError: peft is not installed.
        ValueError: adapters are there already, or the targets name no layer.
    """
    peft = _peft()
    if is_lora(model):
        raise ValueError("policy.lora is given for a policy with adapters already: pass the bare model, or rank 0")
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    with warnings.catch_warnings():
        # Between peft and transformers, of no use to whoever calls this: a renamed property, and GPT-2's transposed
        # layers, which peft then sets itself.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        adapted: nn.Module = peft.get_peft_model(model, options)
    return adapted.eval()


def is_lora(model: nn.Module) -> bool:
    """Whether peft's adapters are in it, and can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


class SharedReference(nn.Module):
    """The policy with its adapters off: the start policy, in the same memory.

    It has no parameters of its own; `parameters()` gives those of the base, so that it is told by its weights as any
    other model is.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: its parameters are the policy's, not this module's
        self.config = policy.config

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The base's parameters, in the base's order."""
        return (p for name, p in self._policy[0].named_parameters(recurse=recurse) if "lora_" not in name)

    def forward(self, **inputs: Any) -> Any:
        """Called as the policy is; no gradient reaches anything."""
        policy: Any = self._policy[0]
        with torch.no_grad(), eval_mode(policy), policy.disable_adapter():
            return policy(**inputs)


def save_lora(policy: Any, path: Path) -> None:
    """Write the adapters alone, as peft does: adapter_model.safetensors and adapter_config.json."""
    policy.save_pretrained(path, safe_serialization=True, save_embedding_layers=False)


def load_lora(policy: nn.Module, path: Path) -> None:
    """Put saved adapters into a policy that has adapters of the same shape.

    Raises:
        ValueError: a tensor that is missing or unknown.
    """
    from safetensors.torch import load_file

    peft = _peft()
    result = peft.set_peft_model_state_dict(policy, load_file(path / WEIGHTS))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path / WEIGHTS} does not fit the policy's adapters: missing {missing[:5]}, "
            f"unknown {list(result.unexpected_keys)[:5]}"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as cause:
        raise ImportError('policy.lora needs peft: pip install "irlfast[lora]"') from cause
    return peft
