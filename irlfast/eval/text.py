"""What a person watches when a policy learns from demonstrations: separability, repetition, length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a random positive scores above a random negative, ties counted half (Mann-Whitney U / nm).

    Args:
        positive: [N] scores; negative: [M] scores.

    Raises:
        ValueError: either is empty, or a score is NaN, which has no rank.
    """
    if positive.numel() == 0 or negative.numel() == 0:
        raise ValueError(f"{positive.numel()} positive and {negative.numel()} negative scores: at least 1 of each")
    ranks = _mid_ranks(torch.cat([positive.flatten(), negative.flatten()]))
    n, m = positive.numel(), negative.numel()
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors [N], ties at their mid-rank; 0 where either does not vary.

    Raises:
        ValueError: lengths that differ, or a NaN, which has no rank.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"rank_correlation needs two vectors of one length, got {list(a.shape)} and {list(b.shape)}")
    if not a.numel():
        return 0.0
    x, y = _mid_ranks(a), _mid_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float((x.square().sum() * y.square().sum()).sqrt())
    return float(x @ y) / norm if norm > 0 else 0.0


def _mid_ranks(scores: Tensor) -> Tensor:
    """Ranks from 1 of scores [N]; equal ones share the average of the ranks that they take up."""
    scores = scores.double()
    if bool(scores.isnan().any()):
        raise ValueError(f"scores[{int(scores.isnan().nonzero()[0])}] is NaN: it has no rank")
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]


def repetition(tokens: Sequence[int], *, order: int = 4) -> float:
    """Share of a text's n-grams that it has said before: 1 - distinct / all; 0 for a text shorter than `order`."""
    grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
