"""What linear_token_stats does with the logits of some columns, between the products that make and consume them.

One program a row of the chunk, float32 [rows, width]: columns [first_column, first_column + width) of a vocabulary,
which the labels number. Each block is reduced at once and its summary merged into the row's running one: no matter how
the vocabulary is cut, as long as no cut goes through a block, the same terms are added in the same order.

A row with an ignored label is there, unlike on the CPU, as the host would have to wait for the GPU to leave it out. Its
running statistics are 0, and so is what is written for it. Those of a row with a label outside the vocabulary are NaN.
"""

import triton
import triton.language as tl

from irlfast.kernels._gradient import gradient_block, gradient_coefficients, label_gradient
from irlfast.kernels._online_softmax import LN_2, LOG2_E, online_softmax_merge, online_softmax_of
from irlfast.kernels._rows import capped, last_block, slope_of_capped, temperature_of

# Arguments whose values make no new kernel, and pointers whose alignment makes none: they are read one by one.
RUNTIME = ["first_column", "running_stride", "state_stride", "ignore_index"]
UNALIGNED = ["labels", "row_temperature", "running", "maximum", "state", "row_numbers"]
UNALIGNED += ["grad_logprob", "grad_entropy", "grad_lse", "grad_reverse_kl", "grad_forward_kl"]


@triton.jit
def label_column(label, first_column, width):
    """Where in the chunk a label is, -1 where it is in another."""
    column = label - first_column
    return tl.where((column >= 0) & (column < width), column, -1).to(tl.int32)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def linear_token_stats_merge(
    logits,  # float32, rows of [width]
    labels,  # int64 [rows]; outside [0, vocab) and not ignore_index makes NaN, and is not read
    row_temperature,  # float32 [rows], or None
    running,  # float64 [4, rows]: maximum, others, weighted, the label's logit; weighted in bits until all is added
    row_stride,
    running_stride,
    first_column,
    width,
    vocab,
    ignore_index,
    temperature,
    softcap,
    WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    temperature = temperature_of(row, row_temperature, temperature)
    scale = LOG2_E / temperature
    label = tl.load(labels + row)
    wanted = label != ignore_index
    outside = wanted & ((label < 0) | (label >= vocab))
    column = label_column(label, first_column, width)

    to_max = running + row
    to_others = to_max + running_stride
    to_weighted = to_others + running_stride
    max = tl.load(to_max).to(tl.float32)
    others = tl.load(to_others).to(tl.float32)
    weighted = tl.zeros([], tl.float32)
    if WEIGHTED:
        weighted = tl.load(to_weighted).to(tl.float32)

    end = tl.where(wanted, width, 0)  # an ignored row is not read
    columns = tl.arange(0, BLOCK)
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        block = capped(tl.load(base + start + columns), softcap, SOFTCAP)
        b_max, b_others, b_weighted = online_softmax_of(block, scale, 0, WEIGHTED)
        max, others, weighted = online_softmax_merge(max, others, weighted, b_max, b_others, b_weighted, scale)
    if whole < end:
        block = last_block(base, whole + columns, end, softcap, SOFTCAP)
        b_max, b_others, b_weighted = online_softmax_of(block, scale, 0, WEIGHTED)
        max, others, weighted = online_softmax_merge(max, others, weighted, b_max, b_others, b_weighted, scale)

    max = tl.where(wanted, tl.where(outside, float("nan"), max), 0.0)
    tl.store(to_max, max.to(tl.float64))
    tl.store(to_others, others.to(tl.float64))
    if WEIGHTED:
        weighted *= tl.where(first_column + width == vocab, LN_2, 1.0)
        tl.store(to_weighted, weighted.to(tl.float64))
    here = wanted & (column >= 0)
    label_logit = capped(tl.load(base + column, mask=here, other=0.0), softcap, SOFTCAP)
    tl.store(to_weighted + running_stride, label_logit.to(tl.float64), mask=here)


@triton.jit
def _write_gradient(
    base, out, width, column, label_value, max, scale, constant, linear, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of gradients, that of the label given; out may be the logits."""
    columns = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        value = gradient_block(tl.load(base + start + columns), max, scale, constant, linear, softcap, SOFTCAP)
        value = tl.where(start + columns == column, label_value, value)
        tl.store(out + start + columns, value.to(out.dtype.element_ty))
    if whole < width:
        within = whole + columns < width
        block = tl.load(base + whole + columns, mask=within, other=0.0)
        value = gradient_block(block, max, scale, constant, linear, softcap, SOFTCAP)
        value = tl.where(whole + columns == column, label_value, value)
        tl.store(out + whole + columns, value.to(out.dtype.element_ty), mask=within)


@triton.jit
def write_zeros(out, width, BLOCK: tl.constexpr):
    """A row that passes no gradient."""
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(out + start + columns, zeros)
    if whole < width:
        tl.store(out + whole + columns, zeros, mask=whole + columns < width)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def linear_token_stats_exponentials(
    logits,
    labels,
    row_temperature,
    maximum,  # float64 [rows]
    out,  # rows of [width]; may be the logits
    row_stride,
    out_stride,
    first_column,
    width,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp((l - maximum) / T) dl / dlogit; 0 at the label, whose share is added apart as it would cancel."""
    row = tl.program_id(0).to(tl.int64)
    temperature = temperature_of(row, row_temperature, temperature)
    label = tl.load(labels + row)
    to = out + row * out_stride
    if label != ignore_index:
        column = label_column(label, first_column, width)
        max = tl.load(maximum + row).to(tl.float32)
        _write_gradient(
            logits + row * row_stride, to, width, column, 0.0, max, LOG2_E / temperature, 1.0, 0.0, softcap, SOFTCAP,
            BLOCK
        )  # fmt: skip
    else:
        write_zeros(to, width, BLOCK)


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=UNALIGNED)
def linear_token_stats_differentiate(
    logits,  # float32, rows of [width]
    labels,  # int64 [rows]
    row_temperature,  # float32 [rows], or None
    state,  # float32 [4, rows]: maximum, others, entropy, the label's logit
    row_numbers,  # int64 [rows], which of the logits' rows these are; None for all
    grad_logprob,  # float32 [rows], or None
    grad_entropy,  # float32 [rows], or None
    grad_lse,  # float32 [rows], or None
    out,  # rows of [width]; may be the logits where they are not numbered
    row_stride,
    out_stride,
    state_stride,
    first_column,
    width,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if row_numbers is not None:
        source = tl.load(row_numbers + row)
    temperature = temperature_of(row, row_temperature, temperature)
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
    to = out + row * out_stride
    if (label != ignore_index) & ((g != 0.0) | (h != 0.0) | (u != 0.0)):
        of_row = state + row
        max = tl.load(of_row)
        others = tl.load(of_row + state_stride)
        entropy = tl.load(of_row + 2 * state_stride)
        label_logit = tl.load(of_row + 3 * state_stride)
        log_sum, constant, row_constant, row_linear = gradient_coefficients(max, others, entropy, g, h, u, temperature)
        label_value = label_gradient(label_logit, g, g, constant, h, max, log_sum, temperature)
        label_value *= slope_of_capped(label_logit, softcap, SOFTCAP)
        _write_gradient(
            logits + source * row_stride, to, width, label_column(label, first_column, width), label_value, max,
            LOG2_E / temperature, row_constant, row_linear, softcap, SOFTCAP, BLOCK
        )  # fmt: skip
    else:
        write_zeros(to, width, BLOCK)
