"""The online softmax of csrc/include/irlfast/online_softmax.h for Triton: what is kept of the logits seen so far, and
how such summaries become one. Every kernel over a vocabulary is built on these functions.

Of logits l (after softcap, before the temperature T) of a part of a row, with scale = log2(e) / T:

    x_v      = (l_v - max) scale                          in bits, so that exp2 needs no further product
    others   = sum over v != argmax of exp2(x_v)
    weighted = sum over v of exp2(x_v) x_v                (the argmax adds 0)

The argmax's own exp2(0) = 1 is left out of `others`: beside 1, a sum below 6e-8 would be lost in float32, and with it
the log-prob -log1p(others) of a confident token. Where maxima tie, all of them but one are others.

A logit of -inf adds exactly 0, and a part without a finite maximum is empty: (-inf, 0, 0). A NaN reaches `others`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_EMPTY = tl.constexpr(float("-inf"))

# exp2 of it is 0 in float32. A stand-in for the -inf that would make NaN of 0 times -inf. Whatever maximum() makes of a
# NaN, `others` has it already.
_NOTHING = tl.constexpr(-200.0)


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0: the logarithm of the rounded sum, corrected for its rounding."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def expm1(y):
    """exp(y) - 1 for y <= 0, with the digits that the difference would lose near 0."""
    w = tl.exp(y)
    near = (y > -1.0) & (w != 1.0)
    corrected = (w - 1.0) * (y / tl.log(tl.where(near, w, 0.5)))
    return tl.where(w == 1.0, y, tl.where(near, corrected, w - 1.0))


@triton.jit
def softcap_value(logit, cap):
    """cap tanh(logit / cap)."""
    t, _ = _tanh(logit / cap)
    return cap * t


@triton.jit
def softcap_slope(logit, cap):
    """1 - tanh^2(logit / cap), the derivative of softcap_value."""
    t, from_one = _tanh(logit / cap)
    return from_one * (1.0 + tl.abs(t))


@triton.jit
def _tanh(y):
    """tanh(y) and 1 - |tanh(y)|, each with its own digits. Triton's tanh is in no interpreter."""
    a = tl.abs(y)
    from_one = 2.0 / (tl.exp(2.0 * a) + 1.0)
    # Below 1/4 the difference from 1 loses digits, and the series is good to 1e-8 of the result.
    s = a * a
    series = a * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    t = tl.where(a < 0.25, series, 1.0 - from_one)
    return tl.where(y < 0.0, -t, t), tl.where(a < 0.25, 1.0 - series, from_one)


@triton.jit
def online_softmax_shift(logit, max, scale):
    """x of a logit or of another part's maximum; -inf where it is -inf, even if max is too."""
    return (logit - tl.where(max == _EMPTY, 0.0, max)) * scale


@triton.jit
def online_softmax_of(logits, scale, axis: tl.constexpr, WEIGHTED: tl.constexpr):
    """Summary (max, others, weighted) of logits along an axis; scale broadcasts to them. weighted is 0 unless asked."""
    top = tl.max(logits, axis)
    wide = tl.expand_dims(top, axis)
    is_top = logits == wide
    shift = online_softmax_shift(logits, wide, scale)
    e = tl.exp2(shift)
    others = tl.sum(tl.where(is_top, 0.0, e), axis) + _ties(is_top, top, axis)
    weighted = tl.zeros_like(others)
    if WEIGHTED:
        weighted = tl.sum(e * tl.maximum(shift, _NOTHING), axis)
    return top, others, weighted


@triton.jit
def online_softmax_merge(a_max, a_others, a_weighted, b_max, b_others, b_weighted, scale):
    """Summary of both parts, elementwise. Where the maxima tie, the second argmax becomes one of the others."""
    b_wins = a_max < b_max
    high = tl.where(b_wins, b_max, a_max)
    low = tl.where(b_wins, a_max, b_max)
    shift = online_softmax_shift(low, high, scale)
    factor = tl.exp2(shift)
    mass = 1.0 + tl.where(b_wins, a_others, b_others)
    others = tl.where(b_wins, b_others, a_others) + factor * mass
    low_weighted = tl.where(b_wins, a_weighted, b_weighted) + tl.maximum(shift, _NOTHING) * mass
    weighted = tl.where(b_wins, b_weighted, a_weighted) + factor * low_weighted
    return high, others, weighted


@triton.jit
def online_softmax_reduce(max, others, weighted, scale, axis: tl.constexpr):
    """Summary of the parts along an axis; scale broadcasts to them."""
    top = tl.max(max, axis)
    wide = tl.expand_dims(top, axis)
    is_top = max == wide
    shift = online_softmax_shift(max, wide, scale)
    factor = tl.exp2(shift)
    mass = 1.0 + others
    sum_others = tl.sum(tl.where(is_top, others, factor * mass), axis) + _ties(is_top, top, axis)
    sum_weighted = tl.sum(factor * (weighted + tl.maximum(shift, _NOTHING) * mass), axis)
    return top, sum_others, sum_weighted


@triton.jit
def _ties(is_top, top, axis: tl.constexpr):
    """How many more than one there are of the maximum; none of an empty part."""
    return tl.where(top == _EMPTY, 0, tl.sum(is_top.to(tl.int32), axis) - 1).to(tl.float32)


@triton.jit
def online_softmax_log_sum(max, others):
    """log sum_v exp(x_v) in nats, the maximum taken out. NaN without a finite maximum: that defines no distribution."""
    return (max - max) + log1p(others)


@triton.jit
def online_softmax_entropy(max, others, weighted):
    """H = log sum exp(x) - sum p x, in nats."""
    return online_softmax_log_sum(max, others) - LN_2 * weighted / (1.0 + others)


@triton.jit
def online_softmax_gradient(logits, max, scale, constant, linear):
    """exp2(x) (constant + linear x): exactly 0 for a logit of -inf."""
    shift = online_softmax_shift(logits, max, scale)
    return tl.exp2(shift) * (constant + linear * tl.maximum(shift, _NOTHING))
