"""linear_token_stats in each of its modes, on any device that has an `Epilogue`; what they are is said there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from irlfast.memory import warm_empty
from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._linear import Epilogue, Gradients, Head, Rows, Upstream, finish, pull, sweep
from irlfast.ops._linear_plan import Plan, Sizes, plan_backward, plan_forward, plan_scaling

# logprob, entropy, lse [N], state [4, N] and what the mode saves.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Share(Protocol):
    """What joins the parts of a vocabulary that is split; the label of a token in another part is negative."""

    def merge(self, running: Tensor, rows: Rows) -> Tensor:
        """The whole vocabulary's running [4, N], of this part's."""

    def reduce(self, gradient: Tensor) -> None:
        """gradient [N, D] = the sum over all parts."""


def forward_chunked(
    epilogue: Epilogue,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    mode: str,
    chunk: int,
    share: Share | None = None,
) -> Outputs:
    head = Head(weight=weight, bias=bias)
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap)
    count = hidden.shape[0]
    labelled = labelled_rows(labels, ignore_index) if epilogue.compacts else None
    plan = plan_forward(Sizes.of(hidden, head.vocab, among(labelled, count)), mode, chunk, of=count)
    x = compact(plan, "compacted hidden", hidden, labelled)
    rows = rows if labelled is None else rows.take(labelled)
    saved = _saved(plan, hidden, labelled)
    expected = None
    if mode == "frozen":
        expected = saved if labelled is None else plan.new("compacted expectation", hidden)
    kept = saved if mode == "keep" else None
    part = sweep(x, head, rows, epilogue, plan, weighted=True, kept=kept, expected=expected)
    running = part if share is None else share.merge(part, rows)
    if expected is not None and share is not None:
        expected *= mass_of(part, running, rows).to(expected.dtype)[:, None]
    finished = finish(running, rows, statistics_dtype(hidden.dtype))
    logprob, entropy, lse, state = (spread(t, labelled, count) for t in finished)
    if expected is not None and labelled is not None:
        saved.index_copy_(0, labelled, expected)
    return logprob, entropy, lse, state, saved


def _saved(plan: Plan, like: Tensor, labelled: Tensor | None) -> Tensor:
    """What forward leaves. Rows that are left out hold 0 in an expectation, and have no place among kept logits."""
    buffer = plan.kept
    if buffer is None:
        return like.new_empty(0, dtype=statistics_dtype(like.dtype))
    if len(buffer.shape) == 2:
        return (like.new_empty if labelled is None else like.new_zeros)(buffer.shape, dtype=buffer.dtype)
    if like.device.type == "cpu":
        return warm_empty(buffer.shape, buffer.dtype)
    return like.new_empty(buffer.shape, dtype=buffer.dtype)


def backward_chunked(
    epilogue: Epilogue,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    mode: str,
    chunk: int,
    state: Tensor,
    saved: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    needs: list[bool],
    share: Share | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] for those not needed."""
    if mode == "frozen" and (needs[1] or needs[2]):
        raise RuntimeError("linear_token_stats: mode='frozen' has no gradient of weight and bias; use another mode")
    head = Head(weight=weight, bias=bias)
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap)
    upstream = Upstream(grad_logprob, grad_entropy, grad_lse)
    # Places are row numbers of the input; `active` are numbers among the labelled rows, whose logits are kept.
    places = active = idle = None
    kept_rows = len(labels)
    if epilogue.compacts:
        places = labelled_rows(labels, ignore_index)
        if places is not None:
            rows, state, upstream = rows.take(places), state[:, places], upstream.take(places)
            kept_rows = len(places)
        active = upstream.nonzero_rows()
        if active is not None:
            rows, state, upstream = rows.take(active), state[:, active], upstream.take(active)
            places = active if places is None else places[active]
    else:
        idle = idle_rows(labels, ignore_index, upstream)
    count = len(labels)
    sizes = Sizes.of(hidden, head.vocab, among(places, count))
    shared = share is not None
    wanted = (needs[0], needs[1], needs[2])
    if mode == "frozen":
        plan = plan_scaling(sizes, upstream.entropy is not None, chunk, of=count, shared=shared)
    else:
        masked = idle is not None and needs[1]
        plan = plan_backward(sizes, mode, wanted, chunk, of=count, masked=masked, shared=shared)
    frame = HiddenGradient(plan, hidden, places, idle, needed=needs[0])
    if mode == "frozen":
        if needs[0]:
            expected = compact(plan, "compacted expectation", saved, places)
            _from_expected(hidden, head, rows, epilogue, plan, state, upstream, expected, frame, shared)
        return frame.result(share), hidden.new_empty(0), hidden.new_empty(0)
    x = frame.masked(hidden) if masked else compact(plan, "compacted hidden", hidden, places)
    of_weight = weight.new_empty(weight.shape) if needs[1] else None
    of_bias = weight.new_empty(weight.shape[:1], dtype=statistics_dtype(weight.dtype)) if needs[2] else None
    gradients = Gradients(frame.sums, of_weight, of_bias)
    if len(x) == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    else:
        pull(
            x,
            head,
            rows,
            epilogue,
            plan,
            state,
            upstream,
            gradients,
            kept=saved if mode == "keep" else None,
            kept_rows=kept_rows,
            row_numbers=active if mode == "keep" else None,
        )
    return (
        frame.result(share),
        hidden.new_empty(0) if of_weight is None else of_weight,
        hidden.new_empty(0) if of_bias is None else of_bias.to(weight.dtype),
    )


class HiddenGradient:
    """dX [N, D] of a call, and what it is summed in.

    Where hidden states are of 16 bits, the gradient's own memory first has the copy of them whose idle rows are 0.
    """

    def __init__(self, plan: Plan, hidden: Tensor, places: Tensor | None, idle: Tensor | None, *, needed: bool) -> None:
        self.plan, self.hidden, self.places, self.idle = plan, hidden, places, idle
        self.gradient: Tensor | None = None
        self.sums: Tensor | None = None
        if needed:
            self.gradient = (hidden.new_empty if places is None else hidden.new_zeros)(hidden.shape)
            self.sums = plan.new("hidden gradient", hidden)
            if self.sums is None and hidden.dtype == statistics_dtype(hidden.dtype):
                self.sums = self.gradient

    def masked(self, hidden: Tensor) -> Tensor:
        """The hidden states, with 0 in rows that take no part: 0 times the NaN that padding may hold is not 0."""
        copy = self.plan.new("masked hidden", hidden)
        copy = self.gradient if copy is None else copy
        assert copy is not None
        assert self.idle is not None
        return copy.copy_(hidden).masked_fill_(self.idle, 0.0)

    def result(self, share: Share | None) -> Tensor:
        """The gradient, of all parts of the vocabulary; [0] where it is not needed."""
        if self.gradient is None:
            return self.hidden.new_empty(0)
        sums, places = self.sums, self.places
        if share is not None and sums is not None:
            if places is not None:  # of whole batches: no rank waits for rows that another has left out
                whole = self.plan.new("spread gradient", self.hidden)
                assert whole is not None
                sums, places = whole.zero_().index_copy_(0, places, sums), None
            share.reduce(sums)
        if sums is not None and places is not None:
            narrow = self.plan.new("compacted gradient", self.hidden)
            self.gradient.index_copy_(0, places, sums if narrow is None else narrow.copy_(sums))
        elif sums is not None and sums is not self.gradient:
            self.gradient.copy_(sums)
        if self.idle is not None:
            self.gradient.masked_fill_(self.idle, 0.0)
        return self.gradient


def _from_expected(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    epilogue: Epilogue,
    plan: Plan,
    state: Tensor,
    upstream: Upstream,
    expected: Tensor,
    frame: HiddenGradient,
    shared: bool,
) -> None:
    """dX (N, D) of a frozen head, from E (N, D), into the frame; a gradient of the entropy is pulled there first."""
    dtype = expected.dtype
    of_label, of_others = (factor.to(dtype)[:, None] for factor in _row_factors(rows, state, upstream))
    if shared:
        of_label.masked_fill_(rows.labels[:, None] < 0, 0.0)  # a token of another part
    labels = rows.labels.clamp(0, head.vocab - 1)  # of rows that are ignored or NaN, where there are any
    if upstream.entropy is not None and len(expected):
        x = compact(plan, "compacted hidden", hidden, frame.places)
        alone = Upstream(None, upstream.entropy, None)
        pull(x, head, rows, epilogue, plan, state, alone, Gradients(frame.sums, None, None))
    of_rows, label_rows, wide_rows = (plan.new(name, hidden) for name in ("rows", "label rows", "wide label rows"))
    assert label_rows is not None
    for begin in range(0, len(expected), max(len(label_rows), 1)):
        which = slice(begin, min(begin + len(label_rows), len(expected)))
        of_label_rows = label_rows[: which.stop - begin]
        torch.index_select(head.weight, 0, labels[which], out=of_label_rows)
        if wide_rows is not None:
            of_label_rows = wide_rows[: which.stop - begin].copy_(of_label_rows)
        if frame.sums is not None:
            out = frame.sums[which]
        else:
            assert of_rows is not None
            out = of_rows[: which.stop - begin]
        if upstream.entropy is None:
            torch.mul(expected[which], of_others[which], out=out)
        else:
            out.addcmul_(expected[which], of_others[which])
        out.addcmul_(of_label_rows, of_label[which])
        if frame.sums is None and frame.gradient is not None:
            frame.gradient[which].copy_(out)


def _row_factors(rows: Rows, state: Tensor, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """What multiplies W_y and E in dX, (N) float64 each, without a gradient of the entropy."""
    maximum, others, _, label = state.double()
    inverse_temperature = rows.inverse_temperature()
    logprob = (label - maximum) * inverse_temperature - others.log1p()
    zero = torch.zeros_like(logprob)
    g = zero if upstream.logprob is None else upstream.logprob.double()
    u = zero if upstream.lse is None else upstream.lse.double()
    # 1 - p_y by expm1: for a confident token it is below float32's spacing at 1.
    of_label = (u * logprob.exp() - g * logprob.expm1()) * rows.slope(label) * inverse_temperature
    return of_label, (u - g) * inverse_temperature


def mass_of(part: Tensor, running: Tensor, rows: Rows) -> Tensor:
    """(N) float64, the probability that a part of the vocabulary has, of running statistics [4, N] of it and of all."""
    mass = ((part[0] - running[0]) * rows.inverse_temperature()).exp() * (1 + part[1]) / (1 + running[1])
    return mass.masked_fill(part[0] == -torch.inf, 0.0)


def among(places: Tensor | None, count: int) -> int:
    """How many rows take part."""
    return count if places is None else len(places)


def compact(plan: Plan, name: str, values: Tensor, places: Tensor | None) -> Tensor:
    """The rows at their places, in the plan's buffer of that name; values themselves without places."""
    if places is None:
        return values
    out = plan.new(name, values)
    assert out is not None
    return torch.index_select(values, 0, places, out=out)


def labelled_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Numbers of the rows that are not ignored, None where all are such."""
    kept = labels != ignore_index
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def idle_rows(labels: Tensor, ignore_index: int, upstream: Upstream) -> Tensor:
    """(N, 1) bool, whether a row that was not left out has no part in any gradient.

    Its hidden states are then 0 in the products: 0 times the NaN or infinity that padding may hold is not 0.
    """
    idle = labels == ignore_index
    active = upstream.nonzero()
    return (idle if active is None else idle | ~active)[:, None]


def spread(values: Tensor, places: Tensor | None, count: int, dim: int = -1) -> Tensor:
    """What dimension dim holds at its places among `count`, zeros elsewhere."""
    if places is None:
        return values
    shape = list(values.shape)
    shape[dim] = count
    return values.new_zeros(shape).index_copy_(dim, places, values)
