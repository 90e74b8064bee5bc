"""Generalised advantage estimation: one program a sequence, one launch, two scans a block from its end.

The first scan finds the value at the next unmasked token, so that every token has its own

    delta_t = r_t + gamma V_next - V_t

and the second is the recurrence A_t = delta_t + gamma lam A_next, written as affine maps of A_next and composed:
a masked token's map is the identity. All in float64.
"""

import triton
import triton.language as tl

from irlfast.kernels._segments import load_mask, load_tokens, number, segment_bounds, zero_outside


@triton.jit
def _nearest(later_value, later_counts, value, counts):
    """Of two neighbours the nearer one that counts; scanned from the end, so the later comes first."""
    return tl.where(counts != 0, value, later_value), later_counts | counts


@triton.jit
def _compose(later_factor, later_term, factor, term):
    """x -> factor (later_factor x + later_term) + term."""
    return factor * later_factor, factor * later_term + term


@triton.jit
def _first(x, index, position):
    """The element of a block at `position`, exactly: sums of it and zeros."""
    return tl.sum(tl.where(index == position, x, 0.0), axis=0)


@triton.jit(do_not_specialize=["width", "total", "gamma", "lam"])
def gae(
    rewards,
    values,
    mask,
    last_values,
    offsets,
    advantages,
    returns,
    width,
    total,
    gamma: tl.int64,
    lam: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """advantages and returns of each token, 0 where masked; last_values [B], or None for 0. gamma, lam: as bits."""
    sequence = tl.program_id(0)
    begin, end = segment_bounds(offsets, width, total, sequence, ALIGNED)
    zero_outside(advantages, offsets, total, BLOCK)
    zero_outside(returns, offsets, total, BLOCK)
    discount = number(gamma)
    decay = discount * number(lam)
    advantage = tl.zeros([], dtype=tl.float64)
    next_value = tl.zeros([], dtype=tl.float64)
    if last_values is not None:
        next_value = tl.load(last_values + sequence).to(tl.float64)
    lane = tl.arange(0, BLOCK)
    for done in range(0, end - begin, BLOCK):
        index = end - done - BLOCK + lane
        inside = index >= begin
        counts = load_mask(mask, index, inside)
        reward = load_tokens(rewards, index, inside, counts).to(tl.float64)
        value = load_tokens(values, index, inside, counts).to(tl.float64)
        # The block moved by one; past its end stands what the blocks after it left.
        after = load_mask(mask, index + 1, (lane < BLOCK - 1) & (index + 1 >= begin))
        after_value = tl.load(values + index + 1, mask=after, other=0.0).to(tl.float64)
        after_value = tl.where(lane == BLOCK - 1, next_value, after_value)
        after = after | (lane == BLOCK - 1)
        following, _ = tl.associative_scan((after_value, after.to(tl.int32)), 0, _nearest, reverse=True)
        delta = tl.where(counts, reward + discount * following - value, 0.0)
        factor, term = tl.associative_scan((tl.where(counts, decay, 1.0), delta), 0, _compose, reverse=True)
        current = factor * advantage + term
        tl.store(advantages + index, tl.where(counts, current, 0.0).to(advantages.dtype.element_ty), mask=inside)
        tl.store(returns + index, tl.where(counts, current + value, 0.0).to(returns.dtype.element_ty), mask=inside)
        # The earliest lane that counts carries over; the maps of masked ones before it are the identity.
        advantage = _first(current, lane, 0)
        next_value = _first(tl.where(counts & (lane == 0), value, tl.where(lane == 0, following, 0.0)), lane, 0)
