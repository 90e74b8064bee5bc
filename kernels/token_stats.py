"""Log-prob of given labels, entropy and log-sum-exp of rows of logits, and their gradient; formulas in
irlfast/ops/token_stats.py.

One program a row, which reads the row once (and, in the backward pass, writes it once), so a row's bits depend on its
own logits and the block alone, whatever else is in the batch. What that gives up: fewer rows than the GPU can hold
programs leave part of it idle, as a row is not shared out. Training batches have thousands of rows.

A program's block is [LANES, VECTOR]: a lane is VECTOR adjacent logits, 16 bytes, one load of one thread. Each lane
keeps a summary of its own, so the loop over the row needs neither shuffles nor barriers; lanes meet once, at the end.
Loads are that wide where the compiler sees every row begin at a multiple of 16 bytes, that is where vocabulary and
strides are multiples of 16; else they are narrow, and correct.

Row r begins at (r // inner) * outer_stride + (r % inner) * inner_stride. None for a pointer leaves its part out.
"""

import triton
import triton.language as tl

from irlfast.kernels._gradient import gradient_block, gradient_coefficients, label_gradient
from irlfast.kernels._online_softmax import (
    LOG2_E,
    online_softmax_entropy,
    online_softmax_log_sum,
    online_softmax_merge,
    online_softmax_of,
    online_softmax_reduce,
    softcap_slope,
)
from irlfast.kernels._rows import block_columns, capped, last_block, row_offset, temperature_of


@triton.jit
def _add_block(logits, max, others, weighted, scale, WEIGHTED: tl.constexpr):
    """The lanes' summaries with a block of logits added."""
    b_max, b_others, b_weighted = online_softmax_of(logits, scale, 1, WEIGHTED)
    return online_softmax_merge(max, others, weighted, b_max, b_others, b_weighted, scale)


# What must make no new kernel when it changes: sizes of the batch, and numbers that are no property of a model.
_RUNTIME = ["rows", "inner", "gradient_inner", "labels_per_row", "ignore_index"]


@triton.jit(do_not_specialize=[name for name in _RUNTIME if name != "gradient_inner"])
def token_stats_forward(
    logits,  # rows of [vocab]
    labels,  # int64 [rows, labels_per_row]; outside [0, vocab) and not ignore_index makes NaN, and is not read
    row_temperature,  # float32 [rows], or None
    logprob,  # float32 [rows, labels_per_row]
    entropy,  # float32 [rows], or None together with lse
    lse,  # float32 [rows]
    state,  # float32 [3, rows], or None: max, others, entropy; max is NaN with a label outside
    rows,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    labels_per_row,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    LABELS: tl.constexpr,  # a power of two from labels_per_row up
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row_offset(row, inner, outer_stride, inner_stride)
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature

    k = tl.arange(0, LABELS)
    label = tl.load(labels + row * labels_per_row + k, mask=k < labels_per_row, other=ignore_index)
    ignored = label == ignore_index
    outside = (label != ignore_index) & ((label < 0) | (label >= vocab))
    label_logit = capped(
        tl.load(base + label, mask=(label >= 0) & (label < vocab) & (label != ignore_index), other=0.0),
        softcap,
        SOFTCAP,
    )

    wanted = tl.sum((label != ignore_index).to(tl.int32), 0) > 0
    end = tl.where(wanted, vocab, 0)  # an ignored row is not read
    columns = block_columns(LANES, VECTOR)
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    lane_others = tl.zeros([LANES], tl.float32)
    lane_weighted = tl.zeros([LANES], tl.float32)
    WEIGHTED: tl.constexpr = entropy is not None
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        block = capped(tl.load(base + start + columns), softcap, SOFTCAP)
        lane_max, lane_others, lane_weighted = _add_block(block, lane_max, lane_others, lane_weighted, scale, WEIGHTED)
    if whole < end:
        block = last_block(base, whole + columns, end, softcap, SOFTCAP)
        lane_max, lane_others, lane_weighted = _add_block(block, lane_max, lane_others, lane_weighted, scale, WEIGHTED)
    max, others, weighted = online_softmax_reduce(lane_max, lane_others, lane_weighted, scale, 0)

    log_sum = online_softmax_log_sum(max, others)
    # The maximum is taken from the logit before the logarithm is: both are exact, their sum would not be.
    value = (label_logit - max) / temperature - log_sum
    value = tl.where(ignored, 0.0, tl.where(outside, float("nan"), value))
    tl.store(logprob + row * labels_per_row + k, value, mask=k < labels_per_row)

    invalid = tl.sum(outside.to(tl.int32), 0) > 0
    max = tl.where(invalid, float("nan"), tl.where(wanted, max, 0.0))
    row_entropy = max - max
    if entropy is not None:
        row_entropy += tl.where(wanted, online_softmax_entropy(max, others, weighted), 0.0)
        tl.store(entropy + row, row_entropy)
        tl.store(lse + row, tl.where(wanted, max / temperature + log_sum, 0.0))
    if state is not None:
        tl.store(state + row, max)
        tl.store(state + rows + row, others)
        tl.store(state + 2 * rows.to(tl.int64) + row, row_entropy)


@triton.jit(do_not_specialize=_RUNTIME)
def token_stats_backward(
    logits,
    labels,
    row_temperature,
    state,  # of the forward pass; its entropy counts only where grad_entropy is given
    grad_logprob,  # float32 [rows, labels_per_row], or None
    grad_entropy,  # float32 [rows], or None
    grad_lse,  # float32 [rows], or None
    gradient,  # rows of [vocab] in the logits' type; may be the logits
    rows,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    gradient_inner,
    gradient_outer_stride,
    gradient_inner_stride,
    labels_per_row,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    LABELS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row_offset(row, inner, outer_stride, inner_stride)
    out = gradient + row_offset(row, gradient_inner, gradient_outer_stride, gradient_inner_stride)
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature

    k = tl.arange(0, LABELS)
    label = tl.load(labels + row * labels_per_row + k, mask=k < labels_per_row, other=ignore_index)
    kept = label != ignore_index
    upstream = tl.zeros([LABELS], tl.float32)
    if grad_logprob is not None:
        upstream = tl.load(grad_logprob + row * labels_per_row + k, mask=kept, other=0.0)
    h = 0.0
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row)
    u = 0.0
    if grad_lse is not None:
        u = tl.load(grad_lse + row)
    wanted = (tl.sum((upstream != 0.0).to(tl.int32), 0) > 0) | (h != 0.0) | (u != 0.0)
    wanted &= tl.sum(kept.to(tl.int32), 0) > 0

    columns = block_columns(LANES, VECTOR)
    BLOCK: tl.constexpr = LANES * VECTOR
    whole = vocab // BLOCK * BLOCK
    if wanted:
        max = tl.load(state + row)
        others = tl.load(state + rows + row)
        row_entropy = 0.0
        if grad_entropy is not None:
            row_entropy = tl.load(state + 2 * rows.to(tl.int64) + row)
        total = tl.sum(upstream, 0)
        log_sum, constant, row_constant, row_linear = gradient_coefficients(
            max, others, row_entropy, total, h, u, temperature
        )

        inside = kept & (label >= 0) & (label < vocab)
        if LABELS == 1:
            # One thread reads the label's logit, and the others have it from the sum: were each to read it, the fastest
            # might overwrite it before the slowest has. The gradient goes into the block that has the label.
            column = tl.sum(tl.where(inside, label, -1), 0).to(tl.int32)
            reader = tl.where(tl.arange(0, LANES) == 0, column, -1)
            logit = tl.load(base + reader, mask=reader >= 0, other=0.0)
            label_logit = tl.sum(logit.to(tl.float32), 0)
            here = total
        else:
            # Read before any is overwritten, written after all else is. A label that is repeated in its row receives
            # all that its repeats do.
            here = tl.zeros([LABELS], tl.float32)
            for j in range(labels_per_row):
                other_label = tl.load(labels + row * labels_per_row + j)
                if grad_logprob is not None:
                    of_other = tl.load(grad_logprob + row * labels_per_row + j)
                    here += tl.where((label == other_label) & kept, of_other, 0.0)
            label_logit = tl.load(base + label, mask=inside, other=0.0).to(tl.float32)
            tl.debug_barrier()
        label_value = label_gradient(
            capped(label_logit, softcap, SOFTCAP), here, total, constant, h, max, log_sum, temperature
        )
        if SOFTCAP:
            label_value *= softcap_slope(label_logit, softcap)

        for start in range(0, whole, BLOCK):
            block = tl.load(base + start + columns)
            value = gradient_block(block, max, scale, row_constant, row_linear, softcap, SOFTCAP)
            if LABELS == 1:
                value = tl.where(start + columns == column, label_value, value)
            tl.store(out + start + columns, value.to(gradient.dtype.element_ty))
        if whole < vocab:
            within = whole + columns < vocab
            block = tl.load(base + whole + columns, mask=within, other=0.0)
            value = gradient_block(block, max, scale, row_constant, row_linear, softcap, SOFTCAP)
            if LABELS == 1:
                value = tl.where(whole + columns == column, label_value, value)
            tl.store(out + whole + columns, value.to(gradient.dtype.element_ty), mask=within)
        if LABELS > 1:
            tl.debug_barrier()
            tl.store(out + label, label_value.to(gradient.dtype.element_ty), mask=inside)
    else:
        zeros = tl.zeros([LANES, VECTOR], gradient.dtype.element_ty)
        for start in range(0, whole, BLOCK):
            tl.store(out + start + columns, zeros)
        if whole < vocab:
            tl.store(out + whole + columns, zeros, mask=whole + columns < vocab)
