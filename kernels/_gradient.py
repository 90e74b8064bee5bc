"""The gradient of a row's logits with respect to its log-prob, entropy and log-sum-exp; formula in
irlfast/ops/token_stats.py."""

import triton
import triton.language as tl

from irlfast.kernels._online_softmax import (
    LN_2,
    expm1,
    online_softmax_gradient,
    online_softmax_log_sum,
    softcap_slope,
)
from irlfast.kernels._rows import capped


@triton.jit
def gradient_coefficients(max, others, entropy, g, h, u, temperature):
    """(log_sum, constant, row_constant, row_linear) of a row, g being the sum of what its labels receive.

    dz_v = p_v (u - g + h (lse - H) - h z_v) with z_v = max / T + x_v: the maximum cancels out of lse - z_v. constant is
    u + h (lse - H); the last two are what online_softmax_gradient takes.
    """
    log_sum = online_softmax_log_sum(max, others)
    constant = u + h * (log_sum - entropy)
    to_logits = 1.0 / ((1.0 + others) * temperature)
    return log_sum, constant, (constant - g) * to_logits + (max - max), -h * LN_2 * to_logits


@triton.jit
def gradient_block(logits, max, scale, constant, linear, softcap, SOFTCAP: tl.constexpr):
    """The gradient of a block of logits, none of them a label's."""
    value = online_softmax_gradient(capped(logits, softcap, SOFTCAP), max, scale, constant, linear)
    if SOFTCAP:
        value *= softcap_slope(logits.to(tl.float32), softcap)
    return value


@triton.jit
def label_gradient(value, upstream, total, constant, h, max, log_sum, temperature):
    """The gradient of a label's logit, without the softcap's slope; `value` is that logit after softcap.

    Of its row's upstream gradients, `total`, the label receives `upstream`.
    """
    x = (value - max) / temperature
    logprob = x - log_sum
    p = tl.exp(logprob)
    spread = tl.where(p == 0.0, 0.0, p * (constant - (total - upstream) - h * x))
    # g (1 - p) by expm1: for a confident token 1 - p is below float32's spacing at 1.
    return (spread - upstream * expm1(logprob)) / temperature
