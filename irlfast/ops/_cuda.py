"""What the ops' CUDA implementations share: whether they can run, and on which stream.

They are compiled when irlfast is installed, by whichever nvcc is there, so the first call is as fast as any other. A
build with IRLFAST_CUDA=EMULATE has the same kernels compiled for the CPU, where tests run them thread by thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES, address
from irlfast.ops._segments_triton import layout

_BUILT: bool = _native.build_info()["cuda_built"]
_EMULATED: bool = _native.build_info().get("cuda_emulated", False)  # a module of before it had one
_HIP = torch.version.hip is not None


def cuda_unavailable(tensor: Tensor) -> str | None:
    """Why the CUDA kernels cannot take a tensor."""
    if not _BUILT and not _EMULATED:
        return (
            "irlfast was built without CUDA kernels: no nvcc was found then, or IRLFAST_CUDA=OFF; install it again "
            "where nvcc is on PATH"
        )
    if tensor.dtype not in DTYPE_CODES:
        return f"the tensor is {tensor.dtype}, the kernel takes {', '.join(map(str, DTYPE_CODES))}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, and the kernel has no rule for those"
    if _EMULATED:
        return None if tensor.is_cpu else f"the tensor is on {tensor.device}, and this build emulates GPUs on the CPU"
    if not tensor.is_cuda or _HIP:
        where = "a GPU of AMD" if tensor.is_cuda else str(tensor.device)
        return f"the tensor is on {where}, the kernel runs on GPUs of NVIDIA"
    # Whatever traces a call decides by what it can see; the op that it records looks at the device.
    return None if torch.compiler.is_compiling() else _device_problem(tensor.device.index)


@cache
def _device_problem(index: int) -> str | None:
    """Why a device cannot run them: a driver too old for the runtime that was linked, or nothing compiled for it."""
    problem = _native.cuda_unavailable(index)
    if not problem:
        return None
    compiled = ", ".join(_native.build_info()["cuda_architectures"])
    return f"cuda:{index} says: {problem}; irlfast was compiled for {compiled}"


def queue(tensor: Tensor) -> tuple[int, int]:
    """The device and its current stream, as native code takes them."""
    if tensor.is_cpu:
        return 0, 0
    index = tensor.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def on_gpu(cuda: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    """A registered op's function for the key "CUDA", which AMD's GPUs have too: as impl="auto" chooses."""

    def run(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return (cuda if cuda_unavailable(tensor) is None else triton)(tensor, *arguments, **keywords)

    return run


def device_segments(
    shape: torch.Size, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, tuple[int, int, int, bool, int]]:
    """The sequences of a padded [B, T] or packed [N] tensor, and the offsets to hold while they are in use.

    (count, width, offsets, wide_offsets, tokens) as native code takes them. Offsets on a GPU are not looked at.
    """
    offsets, count, width, tokens = layout(shape, cu_seqlens)
    if offsets is not None and offsets.dtype not in (torch.int64, torch.int32):
        offsets = offsets.long()
    return offsets, (count, width, address(offsets), offsets is None or offsets.dtype == torch.int64, tokens)
