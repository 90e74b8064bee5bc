"""The chunk loops of linear_policy_ref_stats: each chunk's logits of policy and reference are met in one sweep.

Written once for every device, like `_linear`, whose loop over the policy's gradient is the one used here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._linear import Epilogue, Gradients, Head, Rows, Upstream, blocks, finish, matrix, pull
from irlfast.ops._linear_modes import idle_rows, labelled_rows, spread

# Rows of `running` [9, N] float64: the first four are those of `_linear.sweep`, for the policy; then the reference's
# maximum, others and label's logit, and the sums of csrc/include/irlfast/online_divergence.h.
RUNNING = 9
_REF_MAXIMUM = 4

# logprob, entropy, lse, ref_logprob, reverse_kl, forward_kl [N], and running [9, N].
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class PairEpilogue(Protocol):
    """A device's work on the logits [N, C] of columns first_column and on, of policy and reference.

    Attributes:
        compacts: as of `_linear.Epilogue`, as is the unit of what running sums up.
        alone: the work on the policy's logits by themselves.
    """

    compacts: bool
    alone: Epilogue

    def merge(self, logits: Tensor, ref_logits: Tensor, first_column: int, rows: Rows, running: Tensor) -> None:
        """Adds the columns to running [9, N]."""

    def differentiate(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        first_column: int,
        rows: Rows,
        running: Tensor,
        upstream: Upstream,
        out: Tensor,
    ) -> None:
        """out [N, C] = the gradient of the policy's logits, which may be in the same place."""


class Models(NamedTuple):
    """Weights and biases of the policy's head and of the reference's."""

    weight: Tensor
    bias: Tensor | None
    ref_weight: Tensor
    ref_bias: Tensor | None

    def heads(self, chunk: int) -> tuple[Head, Head]:
        return (
            Head(weight=self.weight, bias=self.bias, chunk=chunk),
            Head(weight=self.ref_weight, bias=self.ref_bias, chunk=chunk),
        )


class _PolicyGradient:
    """What `_linear.pull` asks of an epilogue: makes the reference's logits of its columns, too."""

    def __init__(self, epilogue: PairEpilogue, ref_head: Head, scratch: Tensor) -> None:
        self.epilogue = epilogue
        self.ref_head = ref_head
        self.scratch = scratch

    def differentiate(
        self,
        logits: Tensor,
        first_column: int,
        rows: Rows,
        state: Tensor,
        upstream: Upstream,
        out: Tensor,
        *,
        row_numbers: Tensor | None,
    ) -> None:
        assert rows.ref_hidden is not None
        assert row_numbers is None
        ref_logits = matrix(self.scratch, *logits.shape)
        self.ref_head.logits(rows.ref_hidden, first_column, first_column + logits.shape[1], ref_logits)
        self.epilogue.differentiate(logits, ref_logits, first_column, rows, state, upstream, out)


def forward_pair(
    epilogue: PairEpilogue, hidden: Tensor, models: Models, rows: Rows, ignore_index: int, chunk: int
) -> Outputs:
    head, ref_head = models.heads(chunk)
    count = hidden.shape[0]
    dtype = statistics_dtype(hidden.dtype)
    labelled = labelled_rows(rows.labels, ignore_index) if epilogue.compacts else None
    if labelled is not None:
        hidden, rows = hidden[labelled], rows.take(labelled)
    assert rows.ref_hidden is not None
    block = head.block(dtype)
    running = hidden.new_zeros((RUNNING, len(hidden)), dtype=torch.float64)
    running[0] = running[_REF_MAXIMUM] = -torch.inf
    scratch, ref_scratch = (hidden.new_empty(min(block, len(hidden)) * head.width, dtype=dtype) for _ in range(2))
    for begin, end in head.chunks():
        for which in blocks(len(hidden), block):
            part, x = rows.take(which), hidden[which]
            assert part.ref_hidden is not None
            logits, ref_logits = (matrix(memory, len(x), end - begin) for memory in (scratch, ref_scratch))
            head.logits(x, begin, end, logits)
            ref_head.logits(part.ref_hidden, begin, end, ref_logits)
            epilogue.merge(logits, ref_logits, begin, part, running[:, which])
    statistics = finish(running[:4], rows, dtype)[:3]
    divergences = (t.to(dtype) for t in _finish_pair(running, rows))
    return tuple(  # type: ignore[return-value]
        spread(t, labelled, count) for t in (*statistics, *divergences, running)
    )


def _finish_pair(running: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """ref_logprob, reverse and forward KL; the formulas of csrc/include/irlfast/online_divergence.h."""
    maximum, others, _, _, ref_maximum, ref_others, ref_label, policy_over_ref, ref_over_policy = running
    log_sum = (maximum - maximum) + others.log1p()
    ref_log_sum = (ref_maximum - ref_maximum) + ref_others.log1p()
    ref_logprob = (ref_label - ref_maximum) * rows.inverse_temperature() - ref_log_sum
    log_ratio = log_sum - ref_log_sum

    def divergence(sums: Tensor, others: Tensor, log_ratio: Tensor) -> Tensor:
        infinite = sums.isnan() & ~log_ratio.isnan()  # 0 times infinity
        return sums.masked_fill(infinite, torch.inf) / (1 + others) - log_ratio

    return (
        ref_logprob,
        divergence(policy_over_ref, others, log_ratio),
        divergence(ref_over_policy, ref_others, -log_ratio),
    )


def backward_pair(
    epilogue: PairEpilogue,
    hidden: Tensor,
    models: Models,
    rows: Rows,
    ignore_index: int,
    chunk: int,
    running: Tensor,
    upstream: Upstream,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] for those not needed."""
    head, ref_head = models.heads(chunk)
    dtype = statistics_dtype(hidden.dtype)
    places = labelled_rows(rows.labels, ignore_index) if epilogue.compacts else None
    x = hidden
    if places is not None:
        x, rows, running, upstream = x[places], rows.take(places), running[:, places], upstream.take(places)
    active = upstream.nonzero_rows() if epilogue.compacts else None
    idle = None if epilogue.compacts else idle_rows(rows.labels, ignore_index, upstream)
    if idle is not None:
        x = hidden.masked_fill(idle, 0.0)
    if active is not None:
        x, rows, running, upstream = x[active], rows.take(active), running[:, active], upstream.take(active)
        places = active if places is None else places[active]
    weight = models.weight
    gradients = Gradients(
        hidden.new_empty(x.shape, dtype=dtype) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else None,
    )
    if len(x) == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    elif upstream.reverse_kl is None and upstream.forward_kl is None:
        # The policy alone: nothing of the reference is in the gradient.
        pull(x, head, rows, epilogue.alone, finish(running[:4], rows, dtype).state, upstream, gradients)
    else:
        scratch = x.new_empty(min(head.block(dtype), len(x)) * head.width, dtype=dtype)
        of_pair = _PolicyGradient(epilogue, ref_head, scratch)
        pull(x, head, rows, of_pair, running, upstream, gradients)
    results = [hidden.new_empty(0) if gradient is None else gradient.to(hidden.dtype) for gradient in gradients]
    if gradients.hidden is not None and places is not None:
        results[0] = hidden.new_zeros(hidden.shape).index_copy_(0, places, results[0])
    if gradients.hidden is not None and idle is not None:
        results[0].masked_fill_(idle, 0.0)
    return results[0], results[1], results[2]
