"""What each of two ranks does in the test of sharded policies: a module of its own, for a new process to import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from irlfast.rollout import SGLangOptions, SGLangServerEngine


def update(rank: int, folder: str, url: str) -> None:
    """Shard a model over two ranks, send it, and write down how many were shards and under which name all went."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if rank == 0:
        torch.save(model.state_dict(), Path(folder, "whole.pt"))
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = sum(p.to_local().numel() < p.numel() for p in model.parameters())
    options = SGLangOptions(check_tolerance=1e9)  # the stand-in scores nothing
    engine = SGLangServerEngine([url], eos_token_id=2, pad_token_id=0, policy=model, options=options)
    engine.update_weights(None, 3)
    name = next(name for name, version in engine._versions.items() if version == engine.version == 3)
    Path(folder, f"rank{rank}").write_text(f"{shards} {name}")
    engine.close()
    dist.destroy_process_group()
