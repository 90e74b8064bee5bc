"""One of two tensor-parallel ranks: slime's loss on its columns of the logits, beside the whole written out."""

from __future__ import annotations

import datetime
import sys
import types

import torch
import torch.distributed as dist
from slime_cases import arguments, micro_batch, reducer, written_out

from irlfast.integrations.slime import loss


def main(rank: int, folder: str) -> None:
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    try:
        compare(rank)
    finally:
        dist.destroy_process_group()


def compare(rank: int) -> None:
    mpu = types.ModuleType("megatron.core.mpu")
    mpu.get_tensor_model_parallel_group = lambda: dist.group.WORLD
    core = types.ModuleType("megatron.core")
    core.mpu = mpu
    sys.modules.update({"megatron": types.ModuleType("megatron"), "megatron.core": core})
    args = arguments(tensor_model_parallel_size=2, entropy_coef=0.05, rollout_temperature=0.8, use_tis=True)
    batch, logits = micro_batch()
    expected, metrics = written_out(args, batch, logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    columns = slice(0, 7) if rank == 0 else slice(7, None)
    mine = logits.detach()[..., columns].clone().requires_grad_()
    value, log = loss(args, batch, mine, reducer(args, batch))
    value.backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.grad, gradient[..., columns], rtol=0, atol=1e-12)
    for name, number in log.items():
        torch.testing.assert_close(number, metrics[name].detach(), rtol=0, atol=1e-12, msg=name)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
