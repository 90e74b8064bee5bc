"""Terms of tokens made one number, in plain torch: what `irlfast.losses.aggregation` documents."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from irlfast.ops._segments import Sequences

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def check_aggregation(how: str, denominator: float | Tensor | None) -> None:
    """ValueError for an unknown aggregation, or a denominator that is no positive number or 0-d tensor."""
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation is {how!r}; expected one of {AGGREGATIONS}")
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; expected a number or a 0-d tensor")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; expected a positive count or constant")


def positive(denominator: Tensor) -> float:
    """The value of a denominator on the CPU; ValueError unless it is positive."""
    value = float(denominator)
    if not value > 0:
        raise ValueError(f"denominator is {value}; expected a positive count or constant")
    return value


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32 (float64 stays) with 0 wherever mask is False, NaN and infinities included."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(mask, values.to(dtype), 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of `mask`, 0 where there are none; `values` is 0 outside the mask. 0-d."""
    return values.sum() / mask.sum().clamp(min=1)


def aggregate(
    values: Tensor,
    mask: Tensor,
    how: str,
    denominator: float | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Aggregate `values` [B, T], or packed [N] with cu_seqlens, 0 where `mask` (bool) is False, to a 0-d tensor.

    denominator: what to divide by in place of this batch's own token count, response count or 1. Nothing to count
    gives 0. ValueError: an unknown aggregation, or a denominator that is not positive.
    """
    check_aggregation(how, denominator)
    sequences = Sequences(values, cu_seqlens)
    tokens = sequences.sum(mask)
    per_sequence = sequences.sum(values)
    own: Tensor | float
    if how == "token_mean":
        own = tokens.sum().clamp(min=1)
    elif how == "token_sum":
        own = 1.0
    else:
        own = (tokens > 0).sum().clamp(min=1)
        if how == "seq_mean_token_mean":
            per_sequence = per_sequence / tokens.clamp(min=1)
    result = per_sequence.sum() / (own if denominator is None else denominator)
    return torch.where(tokens.sum() > 0, result, 0.0).to(values.dtype)
