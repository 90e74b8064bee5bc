"""How token terms become one number: an argument of its own, for it changes what a long response weighs.

With m the mask, v the terms, n_i = sum_t m_it and N the number of rows with n_i > 0:

    token_mean            sum_it m v / sum_it m          every token weighs the same (DAPO, Yu et al. 2025)
    seq_mean_token_mean   1/N sum_i 1/n_i sum_t m v      every response weighs the same (GRPO, Shao et al. 2024)
    seq_mean_token_sum    1/N sum_i sum_t m v            the policy gradient of a response's likelihood
    token_sum             sum_it m v                     over the constant `denominator` (Dr. GRPO, Liu et al. 2025)

A batch split over micro-batches and ranks sums to the whole batch's loss where each part is given the whole batch's
`denominator`: its number of tokens for token_mean, of non-empty responses for the two seq_means.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32 (float64 stays) with 0 wherever mask is False, NaN and infinities included."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(mask, values.to(dtype), 0.0)


def aggregate(values: Tensor, mask: Tensor, how: Aggregation, denominator: float | Tensor | None = None) -> Tensor:
    """Aggregate `values` [B, T], 0 where `mask` [B, T] (bool) is False, to a 0-d tensor.

    denominator: what to divide by in place of this batch's own token count, response count or 1. Nothing to count
    gives 0. ValueError: an unknown aggregation, or a denominator that is not positive.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation is {how!r}; expected one of {AGGREGATIONS}")
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; expected a number or a 0-d tensor")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; expected a positive count or constant")
    tokens = mask.sum(dim=1)
    per_sequence = values.sum(dim=1)
    own: Tensor | float
    if how == "token_mean":
        own = tokens.sum().clamp(min=1)
    elif how == "token_sum":
        own = 1.0
    else:
        own = (tokens > 0).sum().clamp(min=1)
        if how == "seq_mean_token_mean":
            per_sequence = per_sequence / tokens.clamp(min=1)
    return per_sequence.sum() / (own if denominator is None else denominator)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of `mask`, 0 where there are none; `values` is 0 outside the mask. 0-d."""
    return values.sum() / mask.sum().clamp(min=1)
