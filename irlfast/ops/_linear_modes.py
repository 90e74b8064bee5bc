"""linear_token_stats in each of its modes, on any device that has an `Epilogue`; what they are is said there."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.memory import warm_empty
from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._linear import Epilogue, Gradients, Head, Rows, Upstream, finish, pull, sweep

# logprob, entropy, lse [N], state [4, N] and what the mode saves.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
) -> Outputs:
    head = Head(weight=weight, bias=bias, chunk=chunk)
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap)
    dtype = statistics_dtype(hidden.dtype)
    count, depth = hidden.shape
    labelled = labelled_rows(labels, ignore_index) if epilogue.compacts else None
    x = hidden
    if labelled is not None:
        x, rows = hidden[labelled], rows.take(labelled)
    kept = expected = None
    if mode == "keep":
        size = (count * weight.shape[0],)
        kept = warm_empty(size, dtype) if hidden.device.type == "cpu" else hidden.new_empty(size, dtype=dtype)
    elif mode == "frozen":
        expected = hidden.new_empty((len(x), depth), dtype=dtype)
    running = sweep(x, head, rows, epilogue, weighted=True, kept=kept, expected=expected)
    finished = finish(running, rows, dtype)
    logprob, entropy, lse, state = (spread(t, labelled, count) for t in finished)
    if kept is not None:
        saved = kept
    elif expected is not None:
        saved = spread(expected, labelled, count, dim=0)
    else:
        saved = hidden.new_empty(0, dtype=dtype)
    return logprob, entropy, lse, state, saved


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; [0] for those not needed."""
    if mode == "frozen" and (needs[1] or needs[2]):
        raise RuntimeError("linear_token_stats: mode='frozen' has no gradient of weight and bias; use another mode")
    head = Head(weight=weight, bias=bias, chunk=chunk)
    dtype = statistics_dtype(hidden.dtype)
    labelled = labelled_rows(labels, ignore_index) if epilogue.compacts else None
    # Places are row numbers of the input; `active` are numbers among the labelled rows, whose logits are kept.
    places: Tensor | None = labelled
    x, rows = hidden, Rows(labels.contiguous(), row_temperature, temperature, softcap)
    upstream = Upstream(grad_logprob, grad_entropy, grad_lse)
    if labelled is not None:
        x, rows, state, upstream = hidden[labelled], rows.take(labelled), state[:, labelled], upstream.take(labelled)
    kept_rows = len(x)
    active = upstream.nonzero_rows() if epilogue.compacts else None
    idle = None if epilogue.compacts else idle_rows(labels, ignore_index, upstream)
    if idle is not None:
        x = hidden.masked_fill(idle, 0.0)
    if active is not None:
        x, rows, state, upstream = x[active], rows.take(active), state[:, active], upstream.take(active)
        places = active if places is None else places[active]

    gradients = Gradients(
        hidden.new_empty(x.shape, dtype=dtype) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else None,
    )
    if mode == "frozen":
        expected = saved if places is None else saved[places]
        of_hidden = _from_expected(x, head, rows, epilogue, state, upstream, expected)
        gradients = gradients._replace(hidden=of_hidden)
    elif len(x) == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    else:
        pull(
            x,
            head,
            rows,
            epilogue,
            state,
            upstream,
            gradients,
            kept=saved if mode == "keep" else None,
            kept_rows=kept_rows,
            row_numbers=active if mode == "keep" else None,
        )
    results = [hidden.new_empty(0) if gradient is None else gradient.to(hidden.dtype) for gradient in gradients]
    if gradients.hidden is not None and places is not None:
        results[0] = hidden.new_zeros(hidden.shape).index_copy_(0, places, results[0])
    if gradients.hidden is not None and idle is not None:
        results[0].masked_fill_(idle, 0.0)
    return results[0], results[1], results[2]


def _from_expected(
    hidden: Tensor, head: Head, rows: Rows, epilogue: Epilogue, state: Tensor, upstream: Upstream, expected: Tensor
) -> Tensor:
    """dX (N, D) of a frozen head, from E (N, D)."""
    maximum, others, _, label = state.double()
    inverse_temperature = rows.inverse_temperature()
    logprob = (label - maximum) * inverse_temperature - others.log1p()
    zero = torch.zeros_like(logprob)
    g = zero if upstream.logprob is None else upstream.logprob.double()
    u = zero if upstream.lse is None else upstream.lse.double()
    # 1 - p_y by expm1: for a confident token it is below float32's spacing at 1.
    of_label = (u * logprob.exp() - g * logprob.expm1()) * rows.slope(label) * inverse_temperature
    of_others = (u - g) * inverse_temperature
    dtype = expected.dtype
    result = expected * of_others.to(dtype)[:, None]
    labels = rows.labels.clamp(0, len(head.weight) - 1)  # of rows that are ignored or NaN, where there are any
    result.addcmul_(head.weight[labels].to(dtype), of_label.to(dtype)[:, None])
    if upstream.entropy is not None:
        upstream = Upstream(None, upstream.entropy, None)
        active = upstream.nonzero_rows() if epilogue.compacts else None
        which: Tensor | slice = slice(None) if active is None else active
        part = hidden[which]
        if len(part):
            more = torch.empty_like(result[which])
            pull(
                part,
                head,
                rows.take(which),
                epilogue,
                state[:, which],
                upstream.take(which),
                Gradients(more, None, None),
            )
            result[which] += more
    return result


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
