"""Temperature and softcap as the vocabulary ops take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_scaling(op: str, temperature: float | Tensor, softcap: float | None, rows_shape: torch.Size) -> None:
    """ValueError unless temperature is positive or broadcasts to the rows, and softcap positive or None."""
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(
                f"{op}: temperature requires grad, and there is no gradient with respect to it; pass "
                "temperature.detach(), or divide the logits by it beforehand"
            )
        try:
            broadcast = torch.broadcast_shapes(temperature.shape, rows_shape)
        except RuntimeError:
            broadcast = None
        if broadcast != rows_shape:
            raise ValueError(
                f"{op}: temperature of shape {tuple(temperature.shape)} does not broadcast to the rows "
                f"{tuple(rows_shape)}; give one value per row"
            )
    elif not (temperature > 0 and temperature < math.inf):
        raise ValueError(f"{op}: temperature = {temperature} is not a positive finite number")
    if softcap is not None and not (softcap > 0 and softcap < math.inf):
        raise ValueError(f"{op}: softcap = {softcap} is not a positive finite number; None switches it off")
