"""linear_token_stats with the products inside: the logits live in registers, tile by tile, and never in memory.

First launch, linear_fused_parts: a program has BLOCK_ROWS rows and one of `splits` parts of the vocabulary. It
multiplies one tile [BLOCK_ROWS, BLOCK_VOCAB] of logits after the other and adds each to its rows' running summary,
which it leaves in memory. Second launch, linear_fused_finish: of a row's summaries, one a part, come its statistics.

Neither tiles nor parts know how many rows there are, so a row has the same bits in every batch. A tile whose rows are
all ignored is not multiplied. A row with a label outside the vocabulary is NaN, and nothing is read for the label.

Programs are numbered row tile by row tile within a part, so that those that run at once share the head's rows in the
cache. Where a GPU copies tiles by itself, `hidden` and `weight` are tensor descriptors, which give 0 beyond the end.
"""

import triton
import triton.language as tl

from irlfast.kernels._online_softmax import (
    LOG2_E,
    online_softmax_entropy,
    online_softmax_log_sum,
    online_softmax_merge,
    online_softmax_of,
    online_softmax_reduce,
)
from irlfast.kernels._rows import capped, temperature_of
from irlfast.kernels.linear_token_stats import label_column


@triton.jit
def _tile(source, first, count, k, depth, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """[ROWS, DEPTH] of a matrix [count, depth] from row `first` and column k on; 0 beyond the columns."""
    if DESCRIPTORS:
        tile = source.load([first, k])
    else:
        # Rows beyond the last are the last again: what is made of them is masked, or not stored.
        rows = tl.minimum(first + tl.arange(0, ROWS), count - 1).to(tl.int64)
        columns = k + tl.arange(0, DEPTH)
        tile = tl.load(source + rows[:, None] * stride + columns[None, :], mask=columns[None, :] < depth, other=0.0)
    return tile


@triton.jit
def _add_logits(
    logits, first, max, others, weighted, label_logit, bias, label, scale, vocab, softcap,
    SOFTCAP: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr
):  # fmt: skip
    """The rows' summaries and labels' logits with WIDTH products [rows, WIDTH] of columns `first` on added.

    STRIP columns at a time: what their reduction takes beside all products has to fit the registers too.
    """
    ROWS: tl.constexpr = logits.shape[0]
    if WIDTH > STRIP:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(logits, [ROWS, 2, HALF]), [0, 2, 1]))
        max, others, weighted, label_logit = _add_logits(
            left, first, max, others, weighted, label_logit, bias, label, scale, vocab, softcap,
            SOFTCAP, HALF, STRIP
        )  # fmt: skip
        max, others, weighted, label_logit = _add_logits(
            right, first + HALF, max, others, weighted, label_logit, bias, label, scale, vocab, softcap,
            SOFTCAP, HALF, STRIP
        )  # fmt: skip
    else:
        columns = first + tl.arange(0, WIDTH)
        if bias is not None:
            logits += tl.load(bias + columns, mask=columns < vocab, other=0.0).to(tl.float32)[None, :]
        logits = capped(logits, softcap, SOFTCAP)
        logits = tl.where(columns[None, :] < vocab, logits, float("-inf"))
        column = label_column(label, first, WIDTH)
        if tl.max(column, 0) >= 0:
            is_label = tl.arange(0, WIDTH)[None, :] == column[:, None]
            label_logit += tl.sum(tl.where(is_label, logits, 0.0), 1)
        b_max, b_others, b_weighted = online_softmax_of(logits, scale[:, None], 1, True)
        max, others, weighted = online_softmax_merge(max, others, weighted, b_max, b_others, b_weighted, scale)
    return max, others, weighted, label_logit


@triton.jit(
    do_not_specialize=["rows", "splits", "ignore_index"],
    do_not_specialize_on_alignment=["labels", "row_temperature", "bias", "parts"],
)
def linear_fused_parts(
    hidden,  # [rows, depth], its rows adjacent elements; or a descriptor of its tiles
    weight,  # [vocab, depth], likewise
    bias,  # [vocab], or None
    labels,  # int64 [rows]
    row_temperature,  # float32 [rows], or None
    parts,  # float32 [4, splits, rows]: maximum, others, weighted, the label's logit or 0
    rows,
    depth,
    vocab,
    hidden_stride,
    weight_stride,
    splits,
    ignore_index,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STRIP: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    split = tl.program_id(0) // row_tiles
    first_row = (tl.program_id(0) % row_tiles) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    within = row < rows
    there = tl.minimum(row, rows - 1)
    label = tl.load(labels + there)
    scale = LOG2_E / (temperature_of(there, row_temperature, temperature) + tl.zeros([BLOCK_ROWS], tl.float32))

    max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    others = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    label_logit = tl.zeros([BLOCK_ROWS], tl.float32)
    tiles = tl.cdiv(vocab, BLOCK_VOCAB)
    begin = split * tiles // splits
    end = (split + 1) * tiles // splits
    wanted = tl.max((within & (label != ignore_index)).to(tl.int32), 0) > 0
    for tile in range(begin, tl.where(wanted, end, begin)):
        first = tile * BLOCK_VOCAB
        logits = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for k in range(0, depth, BLOCK_DEPTH):
            x = _tile(hidden, first_row, rows, k, depth, hidden_stride, BLOCK_ROWS, BLOCK_DEPTH, DESCRIPTORS)
            w = _tile(weight, first, vocab, k, depth, weight_stride, BLOCK_VOCAB, BLOCK_DEPTH, DESCRIPTORS)
            logits = tl.dot(x, w.T, logits, input_precision="ieee")
        max, others, weighted, label_logit = _add_logits(
            logits, first, max, others, weighted, label_logit, bias, label, scale, vocab, softcap,
            SOFTCAP, BLOCK_VOCAB, STRIP
        )  # fmt: skip

    of_split = parts + split.to(tl.int64) * rows + row
    to_next = rows.to(tl.int64) * splits
    tl.store(of_split, max, mask=within)
    tl.store(of_split + to_next, others, mask=within)
    tl.store(of_split + 2 * to_next, weighted, mask=within)
    tl.store(of_split + 3 * to_next, label_logit, mask=within)


@triton.jit(
    do_not_specialize=["rows", "vocab", "ignore_index"],
    do_not_specialize_on_alignment=["parts", "labels", "row_temperature", "logprob", "entropy", "lse", "state"],
)
def linear_fused_finish(
    parts,  # as linear_fused_parts leaves them
    labels,
    row_temperature,
    logprob,  # float32 [rows], as the next two
    entropy,
    lse,
    state,  # float32 [4, rows]: maximum, others, entropy, the label's logit; maximum is NaN with a label outside
    rows,
    vocab,
    ignore_index,
    temperature,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = row < rows
    there = tl.minimum(row, rows - 1)
    label = tl.load(labels + there)
    temperature = temperature_of(there, row_temperature, temperature) + tl.zeros([BLOCK_ROWS], tl.float32)
    scale = LOG2_E / temperature
    to_next = rows.to(tl.int64)
    part = parts + tl.arange(0, SPLITS)[:, None] * to_next + there[None, :]
    max, others, weighted = online_softmax_reduce(
        tl.load(part),
        tl.load(part + to_next * SPLITS),
        tl.load(part + 2 * to_next * SPLITS),
        scale[None, :],
        0,
    )
    label_logit = tl.sum(tl.load(part + 3 * to_next * SPLITS), 0)  # all but one of them are 0

    wanted = label != ignore_index
    outside = wanted & ((label < 0) | (label >= vocab))
    max = tl.where(outside, float("nan"), max)
    log_sum = online_softmax_log_sum(max, others)
    row_entropy = online_softmax_entropy(max, others, weighted)
    # The maximum is taken from the logit before the logarithm is: both are exact, their sum would not be.
    row_logprob = (label_logit - max) / temperature - log_sum
    tl.store(logprob + row, tl.where(wanted, row_logprob, 0.0), mask=within)
    tl.store(entropy + row, tl.where(wanted, row_entropy, 0.0), mask=within)
    tl.store(lse + row, tl.where(wanted, max / temperature + log_sum, 0.0), mask=within)
    to = state + row
    tl.store(to, tl.where(wanted, max, 0.0), mask=within)
    tl.store(to + to_next, tl.where(wanted, others, 0.0), mask=within)
    tl.store(to + 2 * to_next, tl.where(wanted, row_entropy, 0.0), mask=within)
    tl.store(to + 3 * to_next, tl.where(wanted, label_logit, 0.0), mask=within)
