"""How well a learned reward ranks: pairwise accuracy, F1, correlations with a true reward, distance between rewards.

Only order and, for F1, a threshold fitted on other rows are asked of a reward: its zero and its scale mean nothing, so
no accuracy here compares one reward with a fixed number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


class Correlation(NamedTuple):
    """pearson: of the values; spearman and kendall (tau-b): of the ranks, ties counted as such. NaN where either side
    is constant."""

    pearson: float
    spearman: float
    kendall: float


def pair_wins(chosen: ArrayLike, rejected: ArrayLike) -> Array:
    """[P] 1 where chosen scores above rejected, 0 below, 1/2 where they tie.

    Raises:
        ValueError: no pairs, different lengths, or a score that is NaN.
    """
    a, b = _vectors(chosen=chosen, rejected=rejected)
    return np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))


def bootstrap_mean(
    values: ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean with its percentile bootstrap interval.

    Args:
        values: [N].
        clusters: [N] labels; rows of one cluster (the pairs of one prompt) are drawn together, as they are not
            independent. None: each row is its own.
        level: probability of the interval.
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        ValueError: no values, or labels that do not fit.
    """
    (rows,) = _vectors(values=values)
    if clusters is None:
        sums, counts = rows, np.ones_like(rows)
    else:
        if len(clusters) != len(rows):
            raise ValueError(f"{len(clusters)} clusters for {len(rows)} values")
        names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        place = np.array([names[name] for name in clusters])
        sums, counts = np.zeros(len(names)), np.zeros(len(names))
        np.add.at(sums, place, rows)
        np.add.at(counts, place, 1.0)
    picked = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(rows.mean()), float(low), float(high))


def best_f1_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """The threshold at which `scores >= threshold` has the best F1 for `labels` (1 positive, 0 negative), the lowest of
    several. Fit it on validation rows, and use it on test rows.

    Raises:
        ValueError: labels other than 0 and 1, or only one of them.
    """
    values, truth = _labelled(scores, labels)
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    hits = np.cumsum(truth[order])
    # Rows of one score are all above a threshold or all below it.
    last = np.append(ranked[1:] != ranked[:-1], True)
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + truth.sum())
    f1[~last] = -1
    best = np.flatnonzero(f1 == f1.max())[-1]
    return float(ranked[best])


def f1_score(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """F1 of `scores >= threshold` for `labels`; 0 where nothing is above it."""
    values, truth = _labelled(scores, labels)
    above = values >= threshold
    return float(2 * (above & (truth == 1)).sum() / (above.sum() + truth.sum()))


def correlations(a: ArrayLike, b: ArrayLike) -> Correlation:
    """Pearson, Spearman and Kendall (tau-b) of two sets of scores of the same rows, at least two."""
    from scipy import stats

    left, right = _vectors(a=a, b=b)
    if len(left) < 2:
        raise ValueError(f"{len(left)} row: a correlation needs at least 2")
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return Correlation(float("nan"), float("nan"), float("nan"))
    pairs = (stats.pearsonr, stats.spearmanr, stats.kendalltau)
    return Correlation(*(float(statistic(left, right).statistic) for statistic in pairs))


def reward_distance(a: ArrayLike, b: ArrayLike, *, groups: Sequence[Hashable] | None = None) -> float:
    """Pseudo-distance of two rewards that ignores shift and scale: 0 for rewards that agree, 1 for opposite ones.

        d(a, b) = sqrt((1 - rho(C a, C b)) / 2),   C subtracting each prompt's mean, rho Pearson's correlation

    This is the EPIC distance of Gleave et al. 2021 (arXiv 2006.13900), definition 4.6, for rewards of whole responses:
    there is one step, so potential shaping is a shift by prompt, and subtracting the prompt's mean removes it.

    Args:
        a, b: [N] rewards of the same responses.
        groups: [N] prompts; None is one prompt.

    Returns:
        A number in [0, 1]; NaN where a reward is constant in every prompt.
    """
    left, right = _vectors(a=a, b=b)
    if groups is not None:
        if len(groups) != len(left):
            raise ValueError(f"{len(groups)} groups for {len(left)} rewards")
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        index = np.array([names[name] for name in groups])
    else:
        index = np.zeros(len(left), dtype=np.intp)
    left, right = (x - (np.bincount(index, weights=x) / np.bincount(index))[index] for x in (left, right))
    norm = np.sqrt((left**2).sum() * (right**2).sum())
    if norm <= 1e-12 * max(1.0, float(np.abs(left).max() * np.abs(right).max())):
        return float("nan")
    rho = min(1.0, max(-1.0, float((left * right).sum() / norm)))
    return float(np.sqrt((1 - rho) / 2))


def _vectors(**named: ArrayLike) -> tuple[Array, ...]:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    length = len(next(iter(arrays.values())).reshape(-1))
    for name, array in arrays.items():
        if array.ndim != 1 or not len(array) or len(array) != length:
            raise ValueError(f"{name} has shape {array.shape}; expected a vector of {max(length, 1)} numbers")
        if np.isnan(array).any():
            raise ValueError(f"{name}[{int(np.flatnonzero(np.isnan(array))[0])}] is NaN: it has no rank")
    return tuple(arrays.values())


def _labelled(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    values, truth = _vectors(scores=scores, labels=labels)
    if set(np.unique(truth)) != {0.0, 1.0}:
        raise ValueError(f"labels hold {sorted(set(truth))[:5]}; expected both 0 and 1 and nothing else")
    return values, truth
