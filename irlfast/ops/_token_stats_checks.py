"""What token_stats and token_logprobs refuse, and in which words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from irlfast.ops._dispatch import DTYPE_CODES, row_layout, rows_overlap

_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_one_label(op: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim > 0 and labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])} for logits "
            f"{tuple(logits.shape)}; token_logprobs takes several labels a row"
        )


def check_labels(op: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim > 0 and logits.shape[:-1] not in (labels.shape, labels.shape[:-1]):
        shape = ", ".join(map(str, logits.shape[:-1]))
        raise ValueError(
            f"{op}: labels have shape {tuple(labels.shape)}, expected [{shape}] or [{shape}, K] for logits "
            f"{tuple(logits.shape)}"
        )


def check_arguments(
    op: str, logits: Tensor, labels: Tensor, temperature: float | Tensor, softcap: float | None
) -> None:
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: logits are {logits.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"{op}: labels are {labels.dtype}, expected integers; convert them with labels.long()")
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels are on {labels.device}, logits on {logits.device}; move one to the other")
    if logits.ndim == 0:
        raise ValueError(f"{op}: logits are a single number, expected at least one dimension, the vocabulary")
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits of shape {tuple(logits.shape)} have an empty vocabulary")
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(
                f"{op}: temperature requires grad, and there is no gradient with respect to it; pass "
                "temperature.detach(), or divide the logits by it beforehand"
            )
        try:
            broadcast = torch.broadcast_shapes(temperature.shape, logits.shape[:-1])
        except RuntimeError:
            broadcast = None
        if broadcast != logits.shape[:-1]:
            raise ValueError(
                f"{op}: temperature of shape {tuple(temperature.shape)} does not broadcast to the rows "
                f"{tuple(logits.shape[:-1])}; give one value per row"
            )
    elif not (temperature > 0 and temperature < math.inf):
        raise ValueError(f"{op}: temperature = {temperature} is not a positive finite number")
    if softcap is not None and not (softcap > 0 and softcap < math.inf):
        raise ValueError(f"{op}: softcap = {softcap} is not a positive finite number; None switches it off")


def check_inplace(op: str, logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: inplace_backward inside torch.compile: the compiler plans its own buffers, leave it out"
        )
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            f"{op}: inplace_backward on a leaf: its .grad would be its own storage; pass logits a model computed, or "
            "leave inplace_backward out"
        )
    layout = row_layout(logits)
    if layout is None or rows_overlap(layout, logits.shape[-1]):
        raise ValueError(
            f"{op}: inplace_backward on logits of shape {tuple(logits.shape)} and strides {logits.stride()}, whose "
            "rows are scattered or overlap; pass logits.contiguous(), or leave inplace_backward out"
        )
