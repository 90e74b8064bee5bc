"""Divergence between two models' rows of logits over the whole vocabulary, and its gradients; formulas in
irlfast/ops/token_kl.py.

One program a row and blocks of [LANES, VECTOR], as in token_stats. The forward pass reads both rows once; for
Jensen-Shannon, whose mixture needs both normalisers, once more. The backward pass reads both once and writes the
gradients that are wanted.

p and q are the policy and the reference for KL(policy || reference) and for Jensen-Shannon, and change places for
KL(reference || policy), which is the same divergence of the other row.
"""

import triton
import triton.language as tl

from irlfast.kernels._online_divergence import (
    below_and_difference,
    mixture_logs,
    online_divergence_kl,
    online_divergence_merge,
    online_divergence_of,
    online_divergence_reduce,
)
from irlfast.kernels._online_softmax import LOG2_E, online_softmax_log_sum, online_softmax_shift, softcap_slope
from irlfast.kernels._rows import block_columns, capped, last_block, row_offset, temperature_of


@triton.jit
def _mixture_terms(p_logits, q_logits, p_max, p_others, q_max, q_others, scale, weight):
    """p log(p / M) and q log(q / M)."""
    p = tl.exp2(online_softmax_shift(p_logits, p_max, scale)) / (1.0 + p_others)
    q = tl.exp2(online_softmax_shift(q_logits, q_max, scale)) / (1.0 + q_others)
    p_log, q_log = mixture_logs(p, q, weight)
    return p * p_log, q * q_log


@triton.jit(do_not_specialize=["rows", "p_inner", "q_inner"])
def token_kl_forward(
    p_logits,  # rows of [vocab]
    q_logits,  # rows of [vocab], of the same type
    row_temperature,  # float32 [rows], or None
    kl,  # float32 [rows]
    state,  # float64 [6, rows]: p's max and others, q's, and the divergence (Jensen-Shannon: its two parts)
    rows,
    vocab,
    p_inner,
    p_outer_stride,
    p_inner_stride,
    q_inner,
    q_outer_stride,
    q_inner_stride,
    temperature,
    softcap,
    weight,  # of p in the mixture
    MIXED: tl.constexpr,  # Jensen-Shannon
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_base = p_logits + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_base = q_logits + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature

    columns = block_columns(LANES, VECTOR)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab // BLOCK * BLOCK
    p_max = tl.full([LANES], float("-inf"), tl.float32)
    q_max = tl.full([LANES], float("-inf"), tl.float32)
    p_others = tl.zeros([LANES], tl.float32)
    q_others = tl.zeros([LANES], tl.float32)
    p_over_q = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, BLOCK):
        p_block = capped(tl.load(p_base + start + columns), softcap, SOFTCAP)
        q_block = capped(tl.load(q_base + start + columns), softcap, SOFTCAP)
        a, b, c, d, e = online_divergence_of(p_block, q_block, scale, 1)
        p_max, p_others, q_max, q_others, p_over_q = online_divergence_merge(
            p_max, p_others, q_max, q_others, p_over_q, a, b, c, d, e, scale
        )
    if whole < vocab:
        p_block = last_block(p_base, whole + columns, vocab, softcap, SOFTCAP)
        q_block = last_block(q_base, whole + columns, vocab, softcap, SOFTCAP)
        a, b, c, d, e = online_divergence_of(p_block, q_block, scale, 1)
        p_max, p_others, q_max, q_others, p_over_q = online_divergence_merge(
            p_max, p_others, q_max, q_others, p_over_q, a, b, c, d, e, scale
        )
    p_top, p_sum, q_top, q_sum, ratio = online_divergence_reduce(p_max, p_others, q_max, q_others, p_over_q, scale, 0)

    if MIXED:
        p_terms = tl.zeros([LANES], tl.float32)
        q_terms = tl.zeros([LANES], tl.float32)
        for start in range(0, whole, BLOCK):
            p_block = capped(tl.load(p_base + start + columns), softcap, SOFTCAP)
            q_block = capped(tl.load(q_base + start + columns), softcap, SOFTCAP)
            p_term, q_term = _mixture_terms(p_block, q_block, p_top, p_sum, q_top, q_sum, scale, weight)
            p_terms += tl.sum(p_term, 1)
            q_terms += tl.sum(q_term, 1)
        if whole < vocab:
            p_block = last_block(p_base, whole + columns, vocab, softcap, SOFTCAP)
            q_block = last_block(q_base, whole + columns, vocab, softcap, SOFTCAP)
            p_term, q_term = _mixture_terms(p_block, q_block, p_top, p_sum, q_top, q_sum, scale, weight)
            p_terms += tl.sum(p_term, 1)
            q_terms += tl.sum(q_term, 1)
        of_p = tl.sum(p_terms, 0)
        of_q = tl.sum(q_terms, 0)
        defined = online_softmax_log_sum(p_top, p_sum) + online_softmax_log_sum(q_top, q_sum)
        divergence = weight * of_p + (1.0 - weight) * of_q + (defined - defined)
    else:
        divergence = online_divergence_kl(p_top, p_sum, q_top, q_sum, ratio, temperature)
        of_p = divergence
        of_q = 0.0

    tl.store(kl + row, divergence)
    step = rows.to(tl.int64)
    tl.store(state + row, p_top.to(tl.float64))
    tl.store(state + step + row, p_sum.to(tl.float64))
    tl.store(state + 2 * step + row, q_top.to(tl.float64))
    tl.store(state + 3 * step + row, q_sum.to(tl.float64))
    tl.store(state + 4 * step + row, of_p.to(tl.float64))
    tl.store(state + 5 * step + row, tl.zeros([], tl.float64) + of_q)


@triton.jit
def _gradients(
    p_raw, q_raw, p_max, q_max, scale, softcap, weight, p_share, q_share, p_constant, q_constant, p_ratio, q_ratio,
    WANT_P: tl.constexpr, WANT_Q: tl.constexpr, MIXED: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """The gradients of a block of both; what each parameter is, the kernel says."""
    p_logits = capped(p_raw, softcap, SOFTCAP)
    q_logits = capped(q_raw, softcap, SOFTCAP)
    below, difference = below_and_difference(p_logits, q_logits, p_max, q_max)
    p = tl.exp2(below * scale) * p_share
    q = tl.exp2(online_softmax_shift(q_logits, q_max, scale)) * q_share
    if MIXED:
        p_log, q_log = mixture_logs(p, q, weight)
        p_value = p * (p_ratio * p_log + p_constant)
        q_value = q * (q_ratio * q_log + q_constant)
    else:
        p_value = p * (p_ratio * difference + p_constant)
        q_value = q_constant * q - q_ratio * p
    if SOFTCAP:
        if WANT_P:
            p_value *= softcap_slope(p_raw.to(tl.float32), softcap)
        if WANT_Q:
            q_value *= softcap_slope(q_raw.to(tl.float32), softcap)
    return p_value, q_value


@triton.jit(do_not_specialize=["rows", "p_inner", "q_inner", "p_gradient_inner", "q_gradient_inner"])
def token_kl_backward(
    p_logits,
    q_logits,
    row_temperature,
    state,
    upstream,  # float32 [rows]
    p_gradient,  # rows of [vocab] in the logits' type, or None; may be p_logits
    q_gradient,  # the same of q
    rows,
    vocab,
    p_inner,
    p_outer_stride,
    p_inner_stride,
    q_inner,
    q_outer_stride,
    q_inner_stride,
    p_gradient_inner,
    p_gradient_outer_stride,
    p_gradient_inner_stride,
    q_gradient_inner,
    q_gradient_outer_stride,
    q_gradient_inner_stride,
    temperature,
    softcap,
    weight,
    MIXED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_base = p_logits + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_base = q_logits + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    WANT_P: tl.constexpr = p_gradient is not None
    WANT_Q: tl.constexpr = q_gradient is not None
    if WANT_P:
        p_out = p_gradient + row_offset(row, p_gradient_inner, p_gradient_outer_stride, p_gradient_inner_stride)
    if WANT_Q:
        q_out = q_gradient + row_offset(row, q_gradient_inner, q_gradient_outer_stride, q_gradient_inner_stride)
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature

    step = rows.to(tl.int64)
    g = tl.load(upstream + row)
    of_p = tl.load(state + 4 * step + row).to(tl.float32)
    columns = block_columns(LANES, VECTOR)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab // BLOCK * BLOCK
    zero = g == 0.0
    if not MIXED:
        zero |= tl.abs(of_p) == float("inf")
    if zero:
        zeros = tl.zeros([LANES, VECTOR], p_logits.dtype.element_ty)
        for start in range(0, vocab, BLOCK):
            if WANT_P:
                tl.store(p_out + start + columns, zeros, mask=start + columns < vocab)
            if WANT_Q:
                tl.store(q_out + start + columns, zeros, mask=start + columns < vocab)
    else:
        p_max = tl.load(state + row).to(tl.float32)
        p_others = tl.load(state + step + row).to(tl.float32)
        q_max = tl.load(state + 2 * step + row).to(tl.float32)
        q_others = tl.load(state + 3 * step + row).to(tl.float32)
        log_ratio = online_softmax_log_sum(p_max, p_others) - online_softmax_log_sum(q_max, q_others)
        defined = log_ratio - log_ratio  # else NaN
        p_share = 1.0 / (1.0 + p_others)
        q_share = 1.0 / (1.0 + q_others)
        by_logit = g / temperature
        if MIXED:
            # dD/dz_v = w p_v (log(p_v / M_v) - KL(p || M)); of q with the weights exchanged.
            p_ratio = by_logit * weight
            q_ratio = by_logit * (1.0 - weight)
            p_constant = defined - p_ratio * of_p
            q_constant = defined - q_ratio * tl.load(state + 5 * step + row).to(tl.float32)
        else:
            # p_v (log p_v - log q_v - KL), and q_v - p_v of q
            p_ratio = by_logit / temperature
            p_constant = defined - by_logit * (log_ratio + of_p)
            q_ratio = by_logit
            q_constant = defined + by_logit

        for start in range(0, whole, BLOCK):
            p_block = tl.load(p_base + start + columns)
            q_block = tl.load(q_base + start + columns)
            p_value, q_value = _gradients(
                p_block, q_block, p_max, q_max, scale, softcap, weight, p_share, q_share,
                p_constant, q_constant, p_ratio, q_ratio, WANT_P, WANT_Q, MIXED, SOFTCAP
            )  # fmt: skip
            if WANT_P:
                tl.store(p_out + start + columns, p_value.to(p_logits.dtype.element_ty))
            if WANT_Q:
                tl.store(q_out + start + columns, q_value.to(p_logits.dtype.element_ty))
        if whole < vocab:
            within = whole + columns < vocab
            p_block = tl.load(p_base + whole + columns, mask=within, other=0.0)
            q_block = tl.load(q_base + whole + columns, mask=within, other=0.0)
            p_value, q_value = _gradients(
                p_block, q_block, p_max, q_max, scale, softcap, weight, p_share, q_share,
                p_constant, q_constant, p_ratio, q_ratio, WANT_P, WANT_Q, MIXED, SOFTCAP
            )  # fmt: skip
            if WANT_P:
                tl.store(p_out + whole + columns, p_value.to(p_logits.dtype.element_ty), mask=within)
            if WANT_Q:
                tl.store(q_out + whole + columns, q_value.to(p_logits.dtype.element_ty), mask=within)
