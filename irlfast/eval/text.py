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
    scores = torch.cat([positive.flatten(), negative.flatten()]).double()
    if bool(scores.isnan().any()):
        raise ValueError(f"scores[{int(scores.isnan().nonzero()[0])}] is NaN: it has no rank")
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Mid-rank of each distinct value: the average of the ranks that its ties take up.
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]
    n, m = positive.numel(), negative.numel()
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def repetition(tokens: Sequence[int], *, order: int = 4) -> float:
    """Share of a text's n-grams that it has said before: 1 - distinct / all; 0 for a text shorter than `order`."""
    grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
