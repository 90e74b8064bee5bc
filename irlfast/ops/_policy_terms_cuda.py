"""policy_terms by CUDA: one launch forward; backward scales what it leaves. Arguments are the registered op's."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._aggregation import positive
from irlfast.ops._cuda import device_segments, queue
from irlfast.ops._dispatch import DTYPE_CODES, address
from irlfast.ops._segments import native_mask


def sweep_cuda(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    keep: Tensor | None,
    denominator: Tensor | None,
    divisor: float,
    per_token: bool,
    term: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    tis_cap: float,
    icepop_low: float,
    icepop_high: float,
    sequence_correction: bool,
    aggregation: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """As `sweep_cpu`, but for the slopes, which lack a factor that the last of the results is, 0-d."""
    if denominator is not None and denominator.is_cpu:
        divisor, denominator = positive(denominator), None
    if denominator is not None:
        denominator = denominator.to(logprobs.dtype)
    logprobs, advantages = logprobs.contiguous(), advantages.contiguous()
    old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep = (
        None if x is None else x.contiguous() for x in (old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep)
    )
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = device_segments(logprobs.shape, cu_seqlens)
    slopes = torch.empty_like(logprobs) if with_gradient else None
    bonus = with_gradient and entropy is not None and entropy_coef != 0
    entropy_slopes = torch.empty_like(logprobs) if bonus else None
    partials = logprobs.new_empty((segments[0], _native.CUDA_POLICY_PARTIALS), dtype=torch.float64)
    loss, scale = logprobs.new_empty(()), logprobs.new_empty(())
    metrics = logprobs.new_empty((_native.POLICY_METRICS,))
    device, stream = queue(logprobs)
    finished = _finished_blocks(logprobs.device, stream)
    _native.cuda_policy_terms(
        *segments,
        DTYPE_CODES[logprobs.dtype],
        logprobs.data_ptr(),
        address(old_logprobs),
        address(ref_logprobs),
        address(rollout_logprobs),
        address(entropy),
        advantages.data_ptr(),
        per_token,
        address(mask),
        mask_bytes,
        mask_floating,
        address(keep),
        term,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        entropy_coef,
        tis_cap,
        icepop_low,
        icepop_high,
        sequence_correction,
        aggregation,
        divisor,
        address(denominator),
        loss.data_ptr(),
        metrics.data_ptr(),
        address(slopes),
        address(entropy_slopes),
        partials.data_ptr(),
        finished.data_ptr(),
        scale.data_ptr(),
        device,
        stream,
    )
    del held
    return loss, metrics, slopes, entropy_slopes, scale


def _finished_blocks(device: torch.device, stream: int) -> Tensor:
    """A count that is 0 between calls. A stream's calls, one after the other, share one; a graph has its own.

    A graph may be replayed beside a call on the stream that it was captured on.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _count_of_stream(device, stream)


@cache
def _count_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
