"""What the ops' Triton implementations share: whether they can run, and how they are launched.

Triton is imported with the first call of a kernel, never with irlfast.
"""

from __future__ import annotations

import contextlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Block(NamedTuple):
    """A launch configuration as the kernels over a vocabulary take it: a block is [lanes, vector] logits."""

    lanes: int
    vector: int
    num_warps: int
    num_stages: int


def triton_unavailable(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why the Triton kernels cannot take a tensor."""
    if not _INSTALLED:
        return 'Triton is not installed: pip install "irlfast[gpu]"'
    if tensor.dtype not in dtypes:
        return f"the tensor is {tensor.dtype}, the kernel takes {', '.join(map(str, dtypes))}"
    if not tensor.is_cuda and not tensor.is_cpu:
        return f"the tensor is on {tensor.device}, the kernel runs on GPUs of NVIDIA and AMD"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "a torch.func transform is active, and the kernel has no rule for those"
        if tensor.is_cpu and interpreted():
            return None
    if tensor.is_cpu:
        return (
            "the tensor is on the CPU, where Triton can only interpret the kernel, which takes TRITON_INTERPRET=1 in "
            "the environment before Python starts, and no torch.compile"
        )
    return None


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU; settled when Triton is imported."""
    import triton

    from irlfast.kernels import token_stats

    return not isinstance(token_stats.token_stats_forward, triton.JITFunction)


@cache
def target_of(device_index: int) -> str:
    """What kernels on that GPU are compiled for, as the tuning table names it."""
    from triton.runtime import driver

    from irlfast.kernels._tuning import target_name

    with torch.cuda.device(device_index):
        target = driver.active.get_current_target()
    return target_name(target.backend, target.arch)


@cache
def block_for(kernel: str, device_index: int | None, element_bytes: int, vocab: int) -> Block:
    """The configuration of the tuning table; None for the CPU, whose interpreter takes the fallback."""
    from irlfast.kernels._tuning import config

    return as_block(
        config(kernel, "" if device_index is None else target_of(device_index), element_bytes, vocab), element_bytes
    )


def as_block(config: Any, element_bytes: int) -> Block:
    """A `Config` of the tuning table in lanes of 16 bytes."""
    vector = 16 // element_bytes
    return Block(max(config.block // vector, 1), vector, config.num_warps, config.num_stages)


_HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and stream: the device has to be the tensor's."""
    if tensor.is_cpu or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def power_of_two(count: int) -> int:
    """The smallest power of two from `count` up."""
    return 1 << max(count - 1, 0).bit_length()
