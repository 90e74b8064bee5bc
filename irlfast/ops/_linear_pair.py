"""The chunk loops of linear_policy_ref_stats: each chunk's logits of policy and reference are met in one sweep.

Written once for every device, like `_linear`, whose loop over the policy's gradient is the one used here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._linear import Epilogue, Gradients, Head, Rows, Upstream, finish, matrix, pull
from irlfast.ops._linear_modes import HiddenGradient, Share, among, compact, idle_rows, labelled_rows, spread
from irlfast.ops._linear_plan import Sizes, plan_backward, plan_forward

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

    def heads(self) -> tuple[Head, Head]:
        return Head(weight=self.weight, bias=self.bias), Head(weight=self.ref_weight, bias=self.ref_bias)


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
    epilogue: PairEpilogue,
    hidden: Tensor,
    models: Models,
    rows: Rows,
    ignore_index: int,
    chunk: int,
    share: Share | None = None,
) -> Outputs:
    head, ref_head = models.heads()
    count = hidden.shape[0]
    dtype = statistics_dtype(hidden.dtype)
    labelled = labelled_rows(rows.labels, ignore_index) if epilogue.compacts else None
    plan = plan_forward(Sizes.of(hidden, head.vocab, among(labelled, count)), "recompute", chunk, models=2, of=count)
    hidden = compact(plan, "compacted hidden", hidden, labelled)
    rows = rows if labelled is None else rows.take(labelled)
    running, scratch, ref_scratch, sums = (
        plan.new(name, hidden) for name in ("running", "logits", "reference logits", "sums")
    )
    assert running is not None
    assert scratch is not None
    assert ref_scratch is not None
    running.zero_()
    for maximum in (running[0], running[_REF_MAXIMUM]):
        maximum.fill_(-torch.inf)
    for begin, end in plan.chunks(head.vocab):
        for which in plan.blocks(len(hidden)):
            part, x = rows.take(which), hidden[which]
            assert part.ref_hidden is not None
            logits, ref_logits = (matrix(memory, len(x), end - begin) for memory in (scratch, ref_scratch))
            head.logits(x, begin, end, logits, sums)
            ref_head.logits(part.ref_hidden, begin, end, ref_logits, sums)
            epilogue.merge(logits, ref_logits, begin, part, running[:, which])
    running = running if share is None else share.merge(running, rows)
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
    share: Share | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] for those not needed."""
    head, ref_head = models.heads()
    dtype = statistics_dtype(hidden.dtype)
    places = labelled_rows(rows.labels, ignore_index) if epilogue.compacts else None
    if places is not None:
        rows, running, upstream = rows.take(places), running[:, places], upstream.take(places)
    active = upstream.nonzero_rows() if epilogue.compacts else None
    idle = None if epilogue.compacts else idle_rows(rows.labels, ignore_index, upstream)
    if active is not None:
        rows, running, upstream = rows.take(active), running[:, active], upstream.take(active)
        places = active if places is None else places[active]
    alone = upstream.reverse_kl is None and upstream.forward_kl is None
    count, masked = len(hidden), idle is not None and needs[1]
    plan = plan_backward(
        Sizes.of(hidden, head.vocab, among(places, count)),
        "recompute",
        (needs[0], needs[1], needs[2]),
        chunk,
        models=1 if alone else 2,
        of=count,
        masked=masked,
        shared=share is not None,
    )
    frame = HiddenGradient(plan, hidden, places, idle, needed=needs[0])
    x = frame.masked(hidden) if masked else compact(plan, "compacted hidden", hidden, places)
    weight = models.weight
    of_weight = weight.new_empty(weight.shape) if needs[1] else None
    of_bias = weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else None
    gradients = Gradients(frame.sums, of_weight, of_bias)
    if len(x) == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    elif alone:  # nothing of the reference is in the gradient
        pull(x, head, rows, epilogue.alone, plan, finish(running[:4], rows, dtype).state, upstream, gradients)
    else:
        scratch = plan.new("reference logits", x)
        assert scratch is not None
        of_pair = _PolicyGradient(epilogue, ref_head, scratch)
        pull(x, head, rows, of_pair, plan, running, upstream, gradients)
    return (
        frame.result(share),
        hidden.new_empty(0) if of_weight is None else of_weight,
        hidden.new_empty(0) if of_bias is None else of_bias.to(weight.dtype),
    )
