"""One reward in several processes: torchrun's ranks each judge a part of the completions and share one reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn


def rank_and_world() -> tuple[int, int]:
    """(this process, how many there are); (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def share(*modules: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if rank_and_world()[1] == 1:
        return
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.data, src=0)


@torch.no_grad()
def gathered(values: Tensor) -> Tensor:
    """[N] of each rank, which all have as many, one behind the other."""
    world = rank_and_world()[1]
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, so that all take the same step."""
    world = rank_and_world()[1]
    if world == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad.div_(world)


def gathered_objects(value: Any) -> list[Any]:
    """What each rank gave, on rank 0; on the others an empty list."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    parts: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(value, parts)
    return parts or []
