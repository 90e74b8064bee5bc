"""sequence_logprobs by CUDA: one launch a pass. Arguments are the registered ops'."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import device_segments, queue
from irlfast.ops._dispatch import DTYPE_CODES, address, statistics_dtype
from irlfast.ops._segments import native_mask


def forward_cuda(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool) -> Tensor:
    logprobs = logprobs.contiguous()
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = device_segments(logprobs.shape, cu_seqlens)
    result = logprobs.new_empty((segments[0],), dtype=statistics_dtype(logprobs.dtype))
    _native.cuda_sequence_logprobs_forward(
        *segments,
        logprobs.data_ptr(),
        DTYPE_CODES[logprobs.dtype],
        address(mask),
        mask_bytes,
        mask_floating,
        mean,
        result.data_ptr(),
        *queue(logprobs),
    )
    del held
    return result


def backward_cuda(
    grad: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    grad = grad.contiguous()
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = device_segments(shape, cu_seqlens)
    gradient = grad.new_empty(shape, dtype=dtype)
    _native.cuda_sequence_logprobs_backward(
        *segments,
        grad.data_ptr(),
        DTYPE_CODES[dtype],
        address(mask),
        mask_bytes,
        mask_floating,
        mean,
        gradient.data_ptr(),
        *queue(grad),
    )
    del held
    return gradient
