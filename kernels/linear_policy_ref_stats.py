"""What linear_policy_ref_stats does with the policy's and the reference's logits of some columns, between the products
that make and consume them; formulas in irlfast/ops/linear_policy_ref_stats.py.

One program a row of both chunks, float32 [rows, width] each; rows that are ignored or invalid, and the order of sums,
are as in linear_token_stats. p is the policy, q the reference.

running, float64 [9, rows], is that of irlfast/ops/_linear_pair.py. Its sums keep the kernel's units until the last
columns are in: weighted in bits, the divergences' times the temperature.
"""

import triton
import triton.language as tl

from irlfast.kernels._online_divergence import below_and_difference, online_divergence_kl
from irlfast.kernels._online_pair import online_pair_add
from irlfast.kernels._online_softmax import (
    LN_2,
    LOG2_E,
    expm1,
    online_softmax_log_sum,
    online_softmax_shift,
    softcap_slope,
)
from irlfast.kernels._rows import capped, last_block, slope_of_capped, temperature_of
from irlfast.kernels.linear_token_stats import RUNTIME, UNALIGNED, label_column, write_zeros

# exp2 of it is 0, and times a gradient it stays finite: in place of what is infinite where a probability is 0.
_NOTHING = tl.constexpr(-200.0)
_HUGE = tl.constexpr(1e18)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def linear_policy_ref_stats_merge(
    logits,
    ref_logits,
    labels,  # int64 [rows]; outside [0, vocab) and not ignore_index makes NaN, and is not read
    row_temperature,  # float32 [rows], or None
    running,
    row_stride,
    ref_row_stride,
    running_stride,
    first_column,
    width,
    vocab,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    ref_base = ref_logits + row * ref_row_stride
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature
    label = tl.load(labels + row)
    wanted = label != ignore_index
    outside = wanted & ((label < 0) | (label >= vocab))
    column = label_column(label, first_column, width)

    of_row = running + row
    step = tl.cast(running_stride, tl.int64)
    p_max = tl.load(of_row).to(tl.float32)
    p_others = tl.load(of_row + step).to(tl.float32)
    p_weighted = tl.load(of_row + 2 * step).to(tl.float32)
    q_max = tl.load(of_row + 4 * step).to(tl.float32)
    q_others = tl.load(of_row + 5 * step).to(tl.float32)
    p_over_q = tl.load(of_row + 7 * step).to(tl.float32)
    q_over_p = tl.load(of_row + 8 * step).to(tl.float32)

    end = tl.where(wanted, width, 0)  # an ignored row is not read
    columns = tl.arange(0, BLOCK)
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        p_block = capped(tl.load(base + start + columns), softcap, SOFTCAP)
        q_block = capped(tl.load(ref_base + start + columns), softcap, SOFTCAP)
        p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p = online_pair_add(
            p_block, q_block, p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p, scale
        )
    if whole < end:
        p_block = last_block(base, whole + columns, end, softcap, SOFTCAP)
        q_block = last_block(ref_base, whole + columns, end, softcap, SOFTCAP)
        p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p = online_pair_add(
            p_block, q_block, p_max, p_others, p_weighted, q_max, q_others, p_over_q, q_over_p, scale
        )

    last = first_column + width == vocab
    invalid = tl.where(outside, float("nan"), 0.0)
    by_temperature = tl.where(last & wanted, 1.0 / temperature, 1.0)
    tl.store(of_row, tl.where(wanted, p_max + invalid, 0.0).to(tl.float64))
    tl.store(of_row + step, p_others.to(tl.float64))
    tl.store(of_row + 2 * step, (p_weighted * tl.where(last, LN_2, 1.0)).to(tl.float64))
    tl.store(of_row + 4 * step, tl.where(wanted, q_max + invalid, 0.0).to(tl.float64))
    tl.store(of_row + 5 * step, q_others.to(tl.float64))
    tl.store(of_row + 7 * step, (p_over_q * by_temperature).to(tl.float64))
    tl.store(of_row + 8 * step, (q_over_p * by_temperature).to(tl.float64))
    here = wanted & (column >= 0)
    p_label = capped(tl.load(base + column, mask=here, other=0.0), softcap, SOFTCAP)
    q_label = capped(tl.load(ref_base + column, mask=here, other=0.0), softcap, SOFTCAP)
    tl.store(of_row + 3 * step, p_label.to(tl.float64), mask=here)
    tl.store(of_row + 6 * step, q_label.to(tl.float64), mask=here)


@triton.jit
def _gradient(
    p_raw, q_raw, p_max, q_max, scale, constant, linear, ratio, other, softcap, SOFTCAP: tl.constexpr
):  # fmt: skip
    """p_v (constant + linear x_v + ratio (x_v - y_v) T) + other q_v of a block, p and q unnormalised."""
    p_logits = capped(p_raw, softcap, SOFTCAP)
    q_logits = capped(q_raw, softcap, SOFTCAP)
    below, difference = below_and_difference(p_logits, q_logits, p_max, q_max)
    shift = below * scale
    value = constant + linear * tl.maximum(shift, _NOTHING) + ratio * tl.minimum(difference, _HUGE)
    value = tl.exp2(shift) * value + other * tl.exp2(online_softmax_shift(q_logits, q_max, scale))
    if SOFTCAP:
        value *= softcap_slope(p_raw.to(tl.float32), softcap)
    return value


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def linear_policy_ref_stats_differentiate(
    logits,
    ref_logits,
    labels,
    row_temperature,
    running,
    grad_logprob,  # float32 [rows], or None, as the other four
    grad_entropy,
    grad_lse,
    grad_reverse_kl,
    grad_forward_kl,
    out,  # rows of [width]; may be the policy's logits
    row_stride,
    ref_row_stride,
    out_stride,
    running_stride,
    first_column,
    width,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    ref_base = ref_logits + row * ref_row_stride
    to = out + row * out_stride
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature
    label = tl.load(labels + row)
    g = 0.0
    if grad_logprob is not None:
        g = tl.load(grad_logprob + row)
    h = 0.0
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row)
    u = 0.0
    if grad_lse is not None:
        u = tl.load(grad_lse + row)
    s = 0.0
    if grad_reverse_kl is not None:
        s = tl.load(grad_reverse_kl + row)
    f = 0.0
    if grad_forward_kl is not None:
        f = tl.load(grad_forward_kl + row)

    if (label != ignore_index) & ((g != 0.0) | (h != 0.0) | (u != 0.0) | (s != 0.0) | (f != 0.0)):
        of_row = running + row
        step = tl.cast(running_stride, tl.int64)
        p_max = tl.load(of_row).to(tl.float32)
        p_others = tl.load(of_row + step).to(tl.float32)
        p_weighted = tl.load(of_row + 2 * step).to(tl.float32)
        p_label = tl.load(of_row + 3 * step).to(tl.float32)
        q_max = tl.load(of_row + 4 * step).to(tl.float32)
        q_others = tl.load(of_row + 5 * step).to(tl.float32)
        q_label = tl.load(of_row + 6 * step).to(tl.float32)
        p_over_q = tl.load(of_row + 7 * step).to(tl.float32)
        q_over_p = tl.load(of_row + 8 * step).to(tl.float32)
        log_sum = online_softmax_log_sum(p_max, p_others)
        ref_log_sum = online_softmax_log_sum(q_max, q_others)
        reverse_kl = online_divergence_kl(p_max, p_others, q_max, q_others, p_over_q, 1.0)
        forward_kl = online_divergence_kl(q_max, q_others, p_max, p_others, q_over_p, 1.0)
        # An infinite divergence passes no gradient.
        infinite = tl.abs(reverse_kl) == float("inf")
        s = tl.where(infinite, 0.0, s)
        f = tl.where(tl.abs(forward_kl) == float("inf"), 0.0, f)
        # dz_v = p_v (constant - g - h x_v + s (log p_v - log q_v)) - f q_v + g [v = y], NaN without a distribution
        constant = u + h * p_weighted / (1.0 + p_others) + f - s * tl.where(infinite, 0.0, reverse_kl)
        constant += (log_sum - log_sum) + (ref_log_sum - ref_log_sum)
        by_logit = 1.0 / temperature
        share = by_logit / (1.0 + p_others)
        row_constant = (constant - g - s * (log_sum - ref_log_sum)) * share
        row_linear = -h * LN_2 * share
        row_ratio = s * by_logit * share
        row_other = -f * by_logit / (1.0 + q_others)

        x = (p_label - p_max) / temperature
        log_p = x - log_sum
        log_q = (q_label - q_max) / temperature - ref_log_sum
        p = tl.exp(log_p)
        spread = constant - h * x + tl.where(s == 0.0, 0.0, s * (log_p - log_q))
        spread = tl.where(p == 0.0, 0.0, p * spread)
        label_value = (spread - f * tl.exp(log_q) - g * expm1(log_p)) * by_logit
        label_value *= slope_of_capped(p_label, softcap, SOFTCAP)
        column = label_column(label, first_column, width)

        columns = tl.arange(0, BLOCK)
        whole = width // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            value = _gradient(
                tl.load(base + start + columns), tl.load(ref_base + start + columns),
                p_max, q_max, scale, row_constant, row_linear, row_ratio, row_other, softcap, SOFTCAP
            )  # fmt: skip
            value = tl.where(start + columns == column, label_value, value)
            tl.store(to + start + columns, value.to(out.dtype.element_ty))
        if whole < width:
            within = whole + columns < width
            value = _gradient(
                tl.load(base + whole + columns, mask=within, other=0.0),
                tl.load(ref_base + whole + columns, mask=within, other=0.0),
                p_max, q_max, scale, row_constant, row_linear, row_ratio, row_other, softcap, SOFTCAP
            )  # fmt: skip
            value = tl.where(whole + columns == column, label_value, value)
            tl.store(to + whole + columns, value.to(out.dtype.element_ty), mask=within)
    else:
        write_zeros(to, width, BLOCK)
