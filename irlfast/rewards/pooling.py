"""Pool hidden states over the positions of a mask.

    last   the state at the last position of the mask, wherever the padding is
    mean   sum_t m_t h_t / sum_t m_t
    max    the largest value of each feature over the positions of the mask

What stands at the other positions is never read: NaN there changes nothing, and the gradient there is exactly 0. A row
whose mask is empty pools to the zero vector (MATH.md 2: an empty sequence has no weight, and is never NaN).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POOLINGS = ("last", "mean", "max")


def pooling_kinds(kind: str | Sequence[str]) -> tuple[str, ...]:
    """`kind` as a tuple of names.

    Raises:
        ValueError: an unknown name, or none.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    if not kinds:
        raise ValueError(f"pooling is empty: give at least one of {POOLINGS}")
    for name in kinds:
        if name not in POOLINGS:
            raise ValueError(f"pooling {name!r} is unknown, expected one of {POOLINGS} or a sequence of them")
    return kinds


def pool(hidden_states: Tensor, mask: Tensor, kind: str | Sequence[str] = "last") -> Tensor:
    """Pool each row's hidden states.

    Args:
        hidden_states: [B, S, H] floating point.
        mask: [B, S] bool, the positions to pool over.
        kind: "last", "mean" or "max", or a sequence of these, whose results are put side by side.

    Returns:
        [B, H * number of kinds], float32, or float64 for float64 hidden states. Sums are taken in float64, so that
        more or less padding gives the same number.

    Raises:
        ValueError: shapes that disagree, or an unknown kind.
        TypeError: a mask that is not bool.
    """
    kinds = pooling_kinds(kind)
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states must have shape [B, S, H], got {list(hidden_states.shape)}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(f"mask must have shape {list(hidden_states.shape[:2])}, got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}: convert it with .bool()")
    if hidden_states.dtype not in (torch.float32, torch.float64):
        hidden_states = hidden_states.float()
    if mask.shape[1] == 0:
        # No positions at all: every row is empty.
        return hidden_states.sum(1).repeat(1, len(kinds))
    pooled = [_POOLS[name](hidden_states, mask) for name in kinds]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def _last(hidden_states: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(1)
    states = hidden_states[torch.arange(mask.shape[0], device=mask.device), last]
    return states.masked_fill(~mask.any(1, keepdim=True), 0.0)


def _mean(hidden_states: Tensor, mask: Tensor) -> Tensor:
    total = hidden_states.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float64)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


def _max(hidden_states: Tensor, mask: Tensor) -> Tensor:
    largest = hidden_states.masked_fill(~mask[..., None], float("-inf")).amax(1)
    return largest.masked_fill(~mask.any(1, keepdim=True), 0.0)


_POOLS = {"last": _last, "mean": _mean, "max": _max}
