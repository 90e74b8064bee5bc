"""Sums or means of token log-probs over sequences, and their gradient: one program a sequence, one launch a pass."""

import triton
import triton.language as tl

from irlfast.kernels._segments import count_tokens, load_mask, load_tokens, segment_bounds, zero_outside


@triton.jit(do_not_specialize=["width", "total"])
def sequence_forward(
    logprobs, mask, offsets, result, width, total, MEAN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """result [B] = the sum of each sequence's unmasked log-probs, or their mean; 0 where there are none."""
    sequence = tl.program_id(0)
    begin, end = segment_bounds(offsets, width, total, sequence, ALIGNED)
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    tokens = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        counts = load_mask(mask, index, inside)
        lanes += load_tokens(logprobs, index, inside, counts).to(tl.float64)
        tokens += counts.to(tl.int32)
    value = tl.sum(lanes, axis=0)
    if MEAN:
        value = value / tl.maximum(tl.sum(tokens.to(tl.int64), axis=0), 1).to(tl.float64)
    tl.store(result + sequence, value.to(result.dtype.element_ty))


@triton.jit(do_not_specialize=["width", "total"])
def sequence_backward(
    upstream, mask, offsets, gradient, width, total, MEAN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """gradient = upstream of each sequence at its unmasked tokens, over their number for the mean; 0 elsewhere."""
    sequence = tl.program_id(0)
    begin, end = segment_bounds(offsets, width, total, sequence, ALIGNED)
    zero_outside(gradient, offsets, total, BLOCK)
    value = tl.load(upstream + sequence).to(tl.float64)
    if MEAN:
        value = value / tl.maximum(count_tokens(mask, begin, end, BLOCK), 1).to(tl.float64)
    # By way of float32: from float64 to 16 bits at once the interpreter does not know.
    kind = gradient.dtype.element_ty
    share = value if kind == tl.float64 else value.to(tl.float32).to(kind)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts = load_mask(mask, index, index < end)
        tl.store(gradient + index, tl.where(counts, share, 0.0).to(kind), mask=index < end)
