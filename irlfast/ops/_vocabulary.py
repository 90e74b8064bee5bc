"""A vocabulary split over the ranks of a process group, for the ops that reduce over it.

Each rank has adjacent columns of the vocabulary, in the group's rank order, any number of them, and the same rows. A
row's running statistics are gathered, the one collective of a forward pass, and merged in rank order on every rank: the
same operations on the same numbers, so that all ranks have the same bits. Backward, the gradient of the hidden states
is summed over the ranks, the one collective there; what belongs to columns (head, bias, logits) stays where it is.

Ranks that disagree would wait for each other for ever, so they compare sizes and options first. On the CPU that is done
in every call, labels and temperatures included; on a GPU, where the host would wait, once for each shape of the slice,
and rows, labels and options are not compared. That the hidden states are the same nobody sees.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from irlfast.ops._dispatch import DTYPE_CODES
from irlfast.ops._linear import Epilogue, Rows
from irlfast.ops._linear_cpu import check_labels
from irlfast.ops._token_stats_cpu import check_row_temperature
from irlfast.ops.gather_head import all_gather, gather_head, gather_rows, is_sharded, shard_group

# Labels on a rank: a column of its slice, or one of these.
IGNORED, ELSEWHERE, OUTSIDE = -100, -1, -2

_known: WeakKeyDictionary[Any, dict[Any, tuple[int, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A rank's part of a vocabulary.

    Attributes:
        first, columns: where it begins, and how many columns it has.
        vocab: columns of all ranks.
    """

    group: Any
    first: int
    columns: int
    vocab: int

    def localise(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels [N] of the whole vocabulary as this rank has them."""
        here = labels - self.first
        local = here.masked_fill((here < 0) | (here >= self.columns), ELSEWHERE)
        local = local.masked_fill((labels < 0) | (labels >= self.vocab), OUTSIDE)
        return local.masked_fill(labels == ignore_index, IGNORED)

    def merge(self, running: Tensor, rows: Rows) -> Tensor:
        """Running statistics [4 or 9, N] of the whole vocabulary, of this rank's; the same on every rank."""
        for label_logit in _label_logits(running):
            label_logit.masked_fill_(rows.labels < 0, 0.0)
        ranks = dist.get_world_size(self.group)
        parts = running.new_empty((ranks, *running.shape))
        all_gather(parts, running.contiguous(), self.group)
        merged = merge_parts(parts, rows.inverse_temperature())
        # Rows that were not left out: what an epilogue makes of those is no part of a distribution.
        merged.masked_fill_(rows.labels == IGNORED, 0.0)
        merged[0].masked_fill_(rows.labels == OUTSIDE, torch.nan)
        return merged

    def reduce(self, gradient: Tensor) -> None:
        """gradient = its sum over the ranks."""
        dist.all_reduce(gradient, group=self.group)


def _label_logits(running: Tensor) -> list[Tensor]:
    """The policy's, and the reference's of a pair, where a running sum of theirs is."""
    return [running[3]] if len(running) == 4 else [running[3], running[6]]


def merge_parts(parts: Tensor, inverse_temperature: Tensor | float) -> Tensor:
    """Running statistics [4 or 9, N] of parts [R, 4 or 9, N] of a vocabulary, merged in their order.

    The formulas of csrc/include/irlfast/online_softmax.h and online_divergence.h, row by row in float64; the labels'
    logits are added, as all parts but one have 0.
    """
    merged = parts[0].clone()
    for part in parts[1:]:
        if len(merged) == 9:
            merged[7:] = _merge_divergences(merged, part, inverse_temperature)
            merged[4], merged[5], _ = _merge_softmax(
                (merged[4], merged[5], torch.zeros_like(merged[5])),
                (part[4], part[5], torch.zeros_like(part[5])),
                inverse_temperature,
            )
        merged[0], merged[1], merged[2] = _merge_softmax(
            (merged[0], merged[1], merged[2]), (part[0], part[1], part[2]), inverse_temperature
        )
        for total, label_logit in zip(_label_logits(merged), _label_logits(part), strict=True):
            total += label_logit
    return merged


_Softmax = tuple[Tensor, Tensor, Tensor]  # maximum, others, weighted


def _merge_softmax(a: _Softmax, b: _Softmax, inverse_temperature: Tensor | float) -> _Softmax:
    swap = a[0] < b[0]
    low, low_others, low_weighted = (torch.where(swap, x, y) for x, y in zip(a, b, strict=True))
    high, high_others, high_weighted = (torch.where(swap, y, x) for x, y in zip(a, b, strict=True))
    empty = low == -torch.inf
    shift = ((low - high) * inverse_temperature).masked_fill(empty, 0.0)
    factor = shift.exp()
    mass = 1 + low_others
    others = high_others + torch.where(empty, low_others, factor * mass)
    added = torch.where(empty | (factor == 0), 0.0, factor * (low_weighted + shift * mass))
    return high, others, high_weighted + added


def _merge_divergences(a: Tensor, b: Tensor, inverse_temperature: Tensor | float) -> Tensor:
    """Rows 7 and 8, sum_v exp(x_v) (x_v - y_v) and its like, relative to the maxima of both parts."""
    p_max = torch.where(a[0] < b[0], b[0], a[0])
    q_max = torch.where(a[4] < b[4], b[4], a[4])
    total = torch.zeros_like(a[7:])
    for part in (a, b):
        p_empty, q_empty = part[0] == -torch.inf, part[4] == -torch.inf
        p_shift, q_shift = (part[0] - p_max) * inverse_temperature, (part[4] - q_max) * inverse_temperature
        p_factor, q_factor = p_shift.exp().masked_fill(p_empty, 0.0), q_shift.exp().masked_fill(q_empty, 0.0)
        # Where one side has nothing finite yet, the other's sum is 0 or infinite and stays so.
        drift = (p_shift - q_shift).masked_fill(p_empty | q_empty, 0.0)
        for row, factor, moved in (
            (0, p_factor, drift * (1 + part[1])),
            (1, q_factor, -drift * (1 + part[5])),
        ):
            total[row] += factor * torch.where(factor == 0, part[7 + row], part[7 + row] + moved)
    return total


def merge_parts_reference(parts: Tensor, temperature: float = 1.0) -> Tensor:
    """The specification of `merge_parts` for one model: log-sum-exp, entropy and the label's logit [3, N].

    With l_r and H_r of part r alone and p_r = exp(l_r - lse) its share of the probability:

        lse = log sum_r exp l_r,    H = sum_r p_r (H_r + lse - l_r)
    """
    maximum, others, weighted, label = parts.unbind(1)
    lse = maximum / temperature + others.log1p()
    entropy = others.log1p() - weighted / (1 + others)
    whole = lse.logsumexp(0)
    share = (lse - whole).exp()
    spread = torch.where(share > 0, share * (entropy + whole - lse), 0.0)
    return torch.stack([whole, spread.sum(0), label.sum(0)])


def any_column(rows: Rows) -> Rows:
    """Rows whose labels are of this slice or ignored: where the label is elsewhere, its logit is dropped afterwards."""
    return rows._replace(labels=torch.where(rows.labels == IGNORED, rows.labels, rows.labels.clamp(min=0)))


class SlicedEpilogue:
    """An `Epilogue` that is not told which labels are other ranks', while it would take them for invalid."""

    def __init__(self, epilogue: Epilogue) -> None:
        self.epilogue = epilogue
        self.compacts = epilogue.compacts
        self.exponentials = epilogue.exponentials
        self.differentiate = epilogue.differentiate

    def merge(self, logits: Tensor, first_column: int, rows: Rows, running: Tensor, *, weighted: bool) -> None:
        self.epilogue.merge(logits, first_column, any_column(rows), running, weighted=weighted)


def check_rows(labels: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int) -> None:
    """What can be seen on the CPU alone: IndexError or ValueError."""
    if labels.device.type == "cpu":
        check_labels(labels, vocab, ignore_index)
        if isinstance(temperature, Tensor):
            check_row_temperature(temperature.expand(labels.shape))


def agree(
    op: str,
    group: Any,
    device: torch.device,
    columns: int,
    check: Callable[[], None],
    facts: Callable[[], dict[str, int]],
) -> Slice:
    """This rank's slice, once all ranks have said what they were given.

    check: raises for arguments that do not fit together. facts: then what has to be the same on all ranks, where they
    are compared: on a GPU for the first slice of its size, depth and type.

    Raises:
        Whatever check does, on its rank, and ValueError on the others; ValueError on every rank where facts differ.
    """
    refusal: Exception | None = None
    described: dict[str, int] = {}
    try:
        check()
        described = facts()
    except (IndexError, TypeError, ValueError, RuntimeError) as problem:
        refusal = problem
    key = (columns, described.get("depth"), described.get("type"))
    known = _known.setdefault(group, {}) if device.type != "cpu" else {}
    if key not in known or refusal is not None:
        known[key] = _compare(op, group, device, columns, described, refusal)
    sizes = known[key]
    rank = dist.get_rank(group)
    return Slice(group=group, first=sum(sizes[:rank]), columns=columns, vocab=sum(sizes))


# Facts have at most as many numbers, so that a rank without any sends as much as the others.
_FACTS = 16


def _compare(
    op: str, group: Any, device: torch.device, columns: int, facts: dict[str, int], refusal: Exception | None
) -> tuple[int, ...]:
    """Columns of each rank."""
    ranks = dist.get_world_size(group)
    padding = [0] * (_FACTS - len(facts))
    mine = torch.tensor([int(refusal is not None), columns, *facts.values(), *padding], device=device)
    everybody = mine.new_empty(ranks * len(mine))
    all_gather(everybody, mine, group)
    refused, sizes, *values = everybody.view(ranks, -1).t().tolist()
    if any(refused):
        messages: list[str | None] = [None] * ranks
        dist.all_gather_object(messages, None if refusal is None else str(refusal), group=group)
        if refusal is not None:
            raise refusal
        rank = refused.index(1)
        raise ValueError(f"{op}: rank {rank} of the group refused its arguments: {messages[rank]}")
    for name, of_ranks in zip(facts, values, strict=False):
        if len(set(of_ranks)) > 1:
            shown = f": {of_ranks}" if name in ("rows", "depth") else ""
            raise ValueError(
                f"{op}: {name} differ between the ranks of the group{shown}; each rank takes the same rows and options "
                "and its own slice of the head"
            )
    return tuple(sizes)


def fingerprint(values: Tensor | float) -> int:
    """A number that other values hardly have, for hosts to compare."""
    if not isinstance(values, Tensor):
        return int(struct.unpack("<q", struct.pack("<d", values))[0])
    flat = values.detach().reshape(-1)
    bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    return int((bits * (2 * torch.arange(len(bits)) + 1)).sum())


def describe(
    hidden: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    *others: Tensor | None,
) -> dict[str, int]:
    """What every rank has to have alike. others: tensors that are there on all ranks or on none."""
    facts = {
        "rows": labels.numel(),
        "depth": hidden.shape[-1],
        "type": DTYPE_CODES[hidden.dtype],
        "softcaps": fingerprint(softcap or 0.0),
        "values of ignore_index": ignore_index,
        "biases": sum(2**place for place, tensor in enumerate(others) if tensor is not None),
        "needs of a gradient": int(torch.is_grad_enabled() and hidden.requires_grad),
        "temperatures": 0,
    }
    if labels.device.type == "cpu":
        facts["labels"] = fingerprint(labels)
    if not isinstance(temperature, Tensor) or temperature.device.type == "cpu":
        facts["temperatures"] = fingerprint(temperature)
    return facts


def plain(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, such as labels that are replicated."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def take_shards(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Plain tensors of DTensors, and the group whose ranks have a slice each, None where the head is whole.

    A weight without a group is gathered: Shard(0) is what FSDP2's parameters are, and then each rank has rows of its
    own. With hidden states that are replicated on its mesh, or with the group, it is a slice.
    """
    if is_sharded(hidden):
        whole: Any = hidden
        if any(not placement.is_replicate() for placement in whole.placements):
            raise ValueError(
                f"{op}: hidden is placed as {tuple(whole.placements)}, expected Replicate(), or the local tensor of a "
                "rank that has rows of its own"
            )
        if group is None and is_sharded(weight) and weight.device_mesh == whole.device_mesh:  # type: ignore[attr-defined]
            group = shard_group(weight)
        hidden = whole.to_local()
    if not is_sharded(weight):
        return hidden, weight, bias, group
    if group is None:
        dtype = hidden.dtype if weight.is_floating_point() else weight.dtype
        return hidden, gather_head(weight, dtype=dtype), None if bias is None else gather_head(bias, dtype=dtype), None
    ranks, of_weight = (dist.get_process_group_ranks(g) for g in (group, shard_group(weight)))
    if ranks != of_weight:
        raise ValueError(f"{op}: weight is sharded over ranks {of_weight}, the group has {ranks}")
    return hidden, plain(weight), None if bias is None else plain(bias), group


class _Gathered(torch.autograd.Function):
    """The slices of all ranks, for what computes the same on each of them: the gradient is the slice's own."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], part: Slice) -> Tensor:
        ctx.part = part
        return gather_rows(local.detach(), sizes, part.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.part.first : ctx.part.first + ctx.part.columns], None, None


def gathered(local: Tensor, part: Slice) -> Tensor:
    """[V, ...], whole on every rank."""
    sizes = torch.zeros(dist.get_world_size(part.group), dtype=torch.int64, device=local.device)
    sizes[dist.get_rank(part.group)] = part.columns
    dist.all_reduce(sizes, group=part.group)
    whole: Tensor = _Gathered.apply(local, sizes.tolist(), part)
    return whole
