"""sequence_logprobs by Triton: one launch a pass. Arguments are the registered ops'."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._segments_triton import BLOCKS, layout, words
from irlfast.ops._triton import on_device


def forward_triton(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool) -> Tensor:
    from irlfast.kernels import sequence as kernels

    logprobs = logprobs.contiguous()
    offsets, count, width, total = layout(logprobs.shape, cu_seqlens)
    result = logprobs.new_empty((count,), dtype=statistics_dtype(logprobs.dtype))
    block, num_warps = BLOCKS["sequence"]
    if count:
        with on_device(logprobs):
            kernels.sequence_forward[(count,)](
                logprobs,
                words(mask),
                offsets,
                result,
                width,
                total,
                MEAN=mean,
                ALIGNED=width % 16 == 0,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return result


def backward_triton(
    grad: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    from irlfast.kernels import sequence as kernels

    offsets, count, width, total = layout(shape, cu_seqlens)
    gradient = grad.new_empty(shape, dtype=dtype)
    block, num_warps = BLOCKS["sequence"]
    if total and count:
        with on_device(grad):
            kernels.sequence_backward[(count,)](
                grad.contiguous(),
                words(mask),
                offsets,
                gradient,
                width,
                total,
                MEAN=mean,
                ALIGNED=width % 16 == 0,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return gradient
