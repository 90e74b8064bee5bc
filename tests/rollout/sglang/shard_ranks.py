"""What each of two ranks does in the test of sharded policies: a module of its own, for a new process to import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from irlfast.rollout.sglang.weights import policy_tensors


def gather(rank: int, folder: str) -> None:
    """Shard a model over two ranks, gather it, and write down how many were shards and whether all came back whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(10, 6), *layers, nn.Linear(6, 10, bias=False))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    shards = sum(p.to_local().numel() < p.numel() for p in model.parameters())
    tensors = dict(policy_tensors(model))
    same = tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    Path(folder, f"rank{rank}").write_text(f"{shards} {same}")
    dist.destroy_process_group()
