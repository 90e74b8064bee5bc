"""The online softmaxes of two rows at once, with the sum their Kullback-Leibler divergence needs: what
csrc/include/irlfast/online_divergence.h has, for Triton. Built on _online_softmax.

Over the same tokens v of two rows, with x_v = (l_v - p.max) / T and y_v = (r_v - q.max) / T:

    p_over_q = T sum_v exp(x_v) (x_v - y_v)

Differences are summed, not the two logits apart: for models that agree they are small, and what the maxima had in
common is out of them already. They are taken before the temperature, where both are exact. A token of p that q lacks
makes p_over_q infinite, or NaN where it adds 0 times infinity, which is the same: online_divergence_kl tells it from a
NaN among the logits.

A summary is (p_max, p_others, q_max, q_others, p_over_q).
"""

import triton
import triton.language as tl

from irlfast.kernels._online_softmax import (
    log1p,
    online_softmax_log_sum,
    online_softmax_merge,
    online_softmax_of,
    online_softmax_reduce,
)

# A finite stand-in for the infinities that differences of masked logits make, to be multiplied by a probability of 0.
_HUGE = tl.constexpr(1e18)
# The smallest mixture to divide by, and the least that a log1p is taken of; beyond either p is 0 in float32.
_TINY = tl.constexpr(1.2e-38)
_ABOVE_MINUS_ONE = tl.constexpr(-1.0 + 2.0**-24)


@triton.jit
def _below(logit, max):
    """What a logit or a part's maximum lies below the maximum by, negative."""
    return logit - tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def below_and_difference(p_logits, q_logits, p_max, q_max):
    """l - p.max, and (l - p.max) - (r - q.max), finite where p has nothing.

    Where both logits are -inf their difference is NaN, and the stand-in takes its place: hence no maximum(), which may
    keep the NaN. One among the logits themselves is in `others` already.
    """
    below = _below(p_logits, p_max)
    difference = below - _below(q_logits, q_max)
    return below, tl.where(difference > -_HUGE, difference, -_HUGE)


@triton.jit
def online_divergence_sum(p_logits, q_logits, p_max, q_max, scale, axis: tl.constexpr):
    """p_over_q of two rows' logits along an axis, given their maxima."""
    below, difference = below_and_difference(
        p_logits, q_logits, tl.expand_dims(p_max, axis), tl.expand_dims(q_max, axis)
    )
    return tl.sum(tl.exp2(below * scale) * difference, axis)


@triton.jit
def online_divergence_of(p_logits, q_logits, scale, axis: tl.constexpr):
    """Summary of two rows' logits along an axis."""
    p_max, p_others, _ = online_softmax_of(p_logits, scale, axis, False)
    q_max, q_others, _ = online_softmax_of(q_logits, scale, axis, False)
    return p_max, p_others, q_max, q_others, online_divergence_sum(p_logits, q_logits, p_max, q_max, scale, axis)


@triton.jit
def online_divergence_rebase(p_over_q, p_max, p_others, q_max, p_top, q_top, scale):
    """The sum of a part relative to maxima that have risen to p_top and q_top."""
    below, drift = below_and_difference(p_max, q_max, p_top, q_top)
    return tl.exp2(below * scale) * (p_over_q + drift * (1.0 + p_others))


@triton.jit
def online_divergence_merge(
    a_p_max, a_p_others, a_q_max, a_q_others, a_sum, b_p_max, b_p_others, b_q_max, b_q_others, b_sum, scale
):
    """Summary of both parts, elementwise."""
    p_max, p_others, _ = online_softmax_merge(a_p_max, a_p_others, 0.0, b_p_max, b_p_others, 0.0, scale)
    q_max, q_others, _ = online_softmax_merge(a_q_max, a_q_others, 0.0, b_q_max, b_q_others, 0.0, scale)
    a_sum = online_divergence_rebase(a_sum, a_p_max, a_p_others, a_q_max, p_max, q_max, scale)
    b_sum = online_divergence_rebase(b_sum, b_p_max, b_p_others, b_q_max, p_max, q_max, scale)
    return p_max, p_others, q_max, q_others, a_sum + b_sum


@triton.jit
def online_divergence_reduce(p_max, p_others, q_max, q_others, p_over_q, scale, axis: tl.constexpr):
    """Summary of the parts along an axis."""
    p_top, p_sum, _ = online_softmax_reduce(p_max, p_others, tl.zeros_like(p_others), scale, axis)
    q_top, q_sum, _ = online_softmax_reduce(q_max, q_others, tl.zeros_like(q_others), scale, axis)
    rebased = online_divergence_rebase(
        p_over_q, p_max, p_others, q_max, tl.expand_dims(p_top, axis), tl.expand_dims(q_top, axis), scale
    )
    return p_top, p_sum, q_top, q_sum, tl.sum(rebased, axis)


@triton.jit
def online_divergence_kl(p_max, p_others, q_max, q_others, p_over_q, temperature):
    """KL(p || q) in nats. Infinite where p has a token that q lacks; NaN where either row defines no distribution.
    Exactly 0 for equal rows."""
    log_ratio = online_softmax_log_sum(p_max, p_others) - online_softmax_log_sum(q_max, q_others)
    kl = p_over_q / ((1.0 + p_others) * temperature) - log_ratio
    return tl.where((log_ratio == log_ratio) & (p_over_q != p_over_q), float("inf"), kl)


@triton.jit
def mixture_logs(p, q, weight):
    """log(p / M) and log(q / M) of the mixture M = weight p + (1 - weight) q, finite where a probability is 0.

    As log(1 + (1 - w) g) and log(1 - w g) with g = (p - q) / M: errors of g, made where p and q nearly agree, have no
    effect on the divergence to first order.
    """
    g = (p - q) / tl.maximum(weight * p + (1.0 - weight) * q, _TINY)
    return (
        log1p(_limited((1.0 - weight) * g)),
        log1p(_limited(-weight * g)),
    )


@triton.jit
def _limited(u):
    """Above -1; a NaN stays one."""
    return tl.where(u < _ABOVE_MINUS_ONE, _ABOVE_MINUS_ONE, u)
