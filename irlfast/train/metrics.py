"""Metrics of several steps as one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def mean_rows(rows: Sequence[Mapping[str, float]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Each metric over `rows`: its extreme where its name says _min or _max, else its mean.

    `weights` are the sizes of the batches that the rows speak of, by default all equal.
    """
    if not rows:
        return {}
    weights = [1] * len(rows) if weights is None else weights
    total = sum(weights)

    def combine(key: str) -> float:
        values = [row[key] for row in rows]
        if key.endswith("_min"):
            return min(values)
        if key.endswith("_max"):
            return max(values)
        return sum(w * value for w, value in zip(weights, values, strict=True)) / total

    return {key: combine(key) for key in rows[0]}


def prefixed_means(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`mean_rows` under the names prefix/metric."""
    return {f"{prefix}/{key}": value for key, value in mean_rows(rows).items()}
