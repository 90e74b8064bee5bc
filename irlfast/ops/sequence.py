"""Log-probability of whole sequences from the log-probabilities of their tokens.

    sum:  L_i = sum_t m_it logp_it                mean:  L_i = sum_t m_it logp_it / sum_t m_it

over the unmasked tokens of sequence i. Padded rows and packed sequences give the same numbers. A sequence without an
unmasked token has L = 0 and gradient 0 under either reduction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from irlfast.ops._segments import compute_dtype, require_floating, segment_sum

REDUCTIONS = ("sum", "mean")


def sequence_logprobs_reference(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """The definition, one sequence after the other in float64. Arguments and shapes as `sequence_logprobs`."""
    if cu_seqlens is None:
        rows = [(logprobs[i], None if mask is None else mask[i]) for i in range(logprobs.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        rows = [(logprobs[span], None if mask is None else mask[span]) for span in spans]
    results = []
    for values, row_mask in rows:
        kept = values if row_mask is None else values[row_mask.bool()]
        total = kept.double().sum()
        results.append(total / len(kept) if reduction == "mean" and len(kept) else total)
    return torch.stack(results) if results else logprobs.new_zeros(0, dtype=torch.float64)


def sequence_logprobs(
    logprobs: Tensor,  # (B, T), or packed (N)
    mask: Tensor | None = None,  # shaped as logprobs
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1)
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:  # (B)
    """Sum or mean of token log-probabilities over each sequence, in nats.

    Args:
        logprobs: [B, T] padded, or [N] packed with `cu_seqlens`.
        mask: non-zero on the tokens that count, shaped as logprobs; None counts all. What stands at a masked
            position, NaN and infinities included, has no influence and receives gradient 0.
        cu_seqlens: [B + 1] integer offsets; sequence i is logprobs[cu_seqlens[i]:cu_seqlens[i + 1]].
        reduction: "sum", or "mean" over the unmasked tokens.

    Returns:
        [B] float32 (float64 for float64 input), accumulated in float64, so that neither the layout nor the amount
        of padding shows in the result. Differentiable.

    Raises:
        TypeError: logprobs is not floating point, or cu_seqlens is not integer.
        ValueError: shapes that do not fit, an unknown reduction, or offsets that do not rise from 0 to N. The
            values of offsets on a GPU are not looked at, which would stall; they are clamped to the tensor.
    """
    require_floating(logprobs=logprobs)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS}")
    if mask is not None and mask.shape != logprobs.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected that of logprobs, {tuple(logprobs.shape)}")
    expected_rank, layout = (2, "padded [B, T]") if cu_seqlens is None else (1, "packed [N], as cu_seqlens is given")
    if logprobs.dim() != expected_rank:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}; expected {layout}")

    real = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    # Selected, not multiplied: 0 * NaN is NaN.
    values = torch.where(real, logprobs, 0.0)
    if cu_seqlens is None:
        total = values.double().sum(dim=1)
        count = real.sum(dim=1)
    else:
        offsets = _checked_offsets(cu_seqlens, logprobs)
        total = segment_sum(values, offsets)
        count = segment_sum(real, offsets)
    if reduction == "mean":
        total = total / count.clamp(min=1)
    return total.to(compute_dtype(logprobs))


def _checked_offsets(cu_seqlens: Tensor, logprobs: Tensor) -> Tensor:
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected integer offsets")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [B + 1] offsets")
    total = logprobs.shape[0]
    if cu_seqlens.is_cpu:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != total:
            raise ValueError(
                f"cu_seqlens runs from {first} to {last}; expected from 0 to {total}, the length of logprobs"
            )
        falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
        if len(falls):
            i = int(falls[0, 0])
            raise ValueError(f"cu_seqlens falls from {int(cu_seqlens[i])} to {int(cu_seqlens[i + 1])} at sequence {i}")
        return cu_seqlens.to(logprobs.device, torch.int64)
    return cu_seqlens.to(logprobs.device, torch.int64).clamp(0, total).cummax(0).values
