"""An output head that is sharded over data-parallel ranks (FSDP2), whole, for one step.

A parameter of `torch.distributed.fsdp.fully_shard` is a DTensor, Shard(0), while its module is not running. Each rank
has other rows of hidden states, so that the head has to be gathered, and its gradient averaged over the ranks and
sharded again, as FSDP2 does. Both go through buffers of at most 64 MiB, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from irlfast.ops._dispatch import statistics_dtype

# Of all ranks together, in one collective.
BUFFER_BYTES = 64 << 20


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor."""
    return tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "device_mesh")


def all_gather(parts: Tensor, mine: Tensor, group: Any) -> None:
    """parts [R * n] = the ranks' n elements, both contiguous."""
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    run(parts.view(-1), mine.view(-1), group=group)


def _reduce_scatter(mine: Tensor, parts: Tensor, group: Any) -> None:
    """mine [n] = the sum over the ranks of this one's part of their [R * n]."""
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    run(mine.view(-1), parts.view(-1), group=group)


def gather_rows(local: Tensor, sizes: list[int], group: Any) -> Tensor:
    """[sum(sizes), ...], the rows of all ranks in their order; sizes has the number of each, this one's included."""
    whole = local.new_empty((sum(sizes), *local.shape[1:]))
    firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    for begin, end in _steps(local, sizes, local.dtype):
        mine = _padded(local, begin, end)
        parts = local.new_empty((len(sizes), *mine.shape))
        all_gather(parts, mine, group)
        for part, first, size in zip(parts, firsts, sizes, strict=True):
            count = max(0, min(end, size) - begin)
            whole[first + begin : first + begin + count] = part[:count]
    return whole


def scatter_mean(whole: Tensor, sizes: list[int], group: Any) -> Tensor:
    """This rank's rows [size, ...] of the mean over the ranks, summed in float32 at least."""
    rank, dtype = dist.get_rank(group), statistics_dtype(whole.dtype)
    firsts = [sum(sizes[:r]) for r in range(len(sizes))]
    local = whole.new_empty((sizes[rank], *whole.shape[1:]))
    for begin, end in _steps(local, sizes, dtype):
        parts = whole.new_zeros((len(sizes), end - begin, *whole.shape[1:]), dtype=dtype)
        for part, first, size in zip(parts, firsts, sizes, strict=True):
            count = max(0, min(end, size) - begin)
            part[:count] = whole[first + begin : first + begin + count]
        mine = torch.empty_like(parts[0])
        _reduce_scatter(mine, parts, group)
        count = max(0, min(end, sizes[rank]) - begin)
        local[begin : begin + count] = mine[:count] / len(sizes)
    return local


def _steps(local: Tensor, sizes: list[int], dtype: torch.dtype) -> list[tuple[int, int]]:
    """(begin, end) among the rows of a rank."""
    a_row = max(1, local[:1].numel() if len(local) else local.new_empty((1, *local.shape[1:])).numel())
    step = max(1, BUFFER_BYTES // (a_row * dtype.itemsize * len(sizes)))
    return [(begin, min(begin + step, max(sizes))) for begin in range(0, max(sizes), step)]


def _padded(local: Tensor, begin: int, end: int) -> Tensor:
    part = local[begin:end]
    if len(part) == end - begin:
        return part.contiguous()
    whole = part.new_zeros((end - begin, *part.shape[1:]))
    whole[: len(part)] = part
    return whole


class _GatherHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        mesh, placements = weight.device_mesh, weight.placements
        dimension = _sharded_dimension(mesh, placements)
        ctx.spec = mesh, placements, dimension, weight.shape, weight.stride(), weight.dtype
        ctx.sizes = _shares(weight.shape[0], mesh.size(dimension))
        local: Tensor = weight.to_local()
        return gather_rows(local.detach().to(dtype), ctx.sizes, mesh.get_group(dimension))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        from torch.distributed.tensor import DTensor

        mesh, placements, dimension, shape, stride, dtype = ctx.spec
        local = scatter_mean(gradient, ctx.sizes, mesh.get_group(dimension))
        for other in range(mesh.ndim):
            if other != dimension:  # replicas, of which each has rows of its own
                wide = local.to(statistics_dtype(local.dtype))
                dist.all_reduce(wide, group=mesh.get_group(other))
                local = (wide / mesh.size(other)).to(local.dtype)
        return DTensor.from_local(local.to(dtype), mesh, placements, run_check=False, shape=shape, stride=stride), None


def _shares(count: int, ranks: int) -> list[int]:
    """Rows of each rank under Shard(0): as torch.chunk cuts, the last ones possibly without any."""
    most = -(-count // ranks)
    return [max(0, min(count, (rank + 1) * most) - rank * most) for rank in range(ranks)]


def _sharded_dimension(mesh: Any, placements: Any) -> int:
    """The dimension of the mesh whose ranks have different rows."""
    from torch.distributed.tensor import Replicate, Shard

    sharded = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(sharded) != 1 or type(placements[sharded[0]]) is not Shard or placements[sharded[0]].dim != 0:
        raise ValueError(
            f"gather_head: the head is placed as {tuple(placements)} on a mesh of {tuple(mesh.shape)}, expected "
            "Shard(0) on one dimension and Replicate() on the others; redistribute it first"
        )
    return sharded[0]


def shard_group(weight: Any) -> Any:
    """The process group that a DTensor's rows are sharded over."""
    return weight.device_mesh.get_group(_sharded_dimension(weight.device_mesh, weight.placements))


def gather_head(
    weight: Tensor,  # (V, ...) DTensor
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:  # (V, ...)
    """A head or its bias that is sharded over data-parallel ranks, whole: one gathering for all that a step computes.

    The ops call it for a weight that is a DTensor. Whoever needs the head several times in a step calls it once, and
    passes the result on: its gradients are then added up before they are averaged over the ranks.

    Args:
        weight: a DTensor, Shard(0) on one dimension of its mesh and replicated on the others, as FSDP2's parameters
            are. A plain tensor, such as a parameter that FSDP2 has gathered, is returned as it is.
        dtype: to convert to before gathering, as FSDP2's mixed precision does; None keeps the weight's.

    Returns:
        A plain tensor, the same on every rank. Its gradient arrives at `weight` as the mean over all ranks of the mesh,
        summed in float32 at least, in the weight's type and placement.

    Raises:
        ValueError: another placement.
    """
    if not is_sharded(weight):
        return weight if dtype is None else weight.to(dtype)
    _sharded_dimension(weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    result: Tensor = _GatherHead.apply(weight, weight.dtype if dtype is None else dtype)
    return result
