"""policy_terms by Triton: two launches forward; backward scales what they leave. Arguments are the registered op's."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.ops._segments_triton import BLOCKS, bits, layout, words
from irlfast.ops._triton import on_device


def sweep_triton(
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
    from irlfast.kernels import _policy_sums as sums
    from irlfast.kernels import policy_terms as kernels

    if denominator is not None and denominator.is_cpu:
        divisor, denominator = positive(denominator), None
    logprobs, advantages = logprobs.contiguous(), advantages.contiguous()
    old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep = (
        None if x is None else x.contiguous() for x in (old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep)
    )
    offsets, count, width, total = layout(logprobs.shape, cu_seqlens)
    slopes = torch.empty_like(logprobs) if with_gradient else None
    bonus = with_gradient and entropy is not None and entropy_coef != 0
    entropy_slopes = torch.empty_like(logprobs) if bonus else None
    partials = logprobs.new_empty((count, sums.PARTIALS.value), dtype=torch.float64)
    loss, metrics, scale = logprobs.new_empty(()), logprobs.new_empty((sums.METRICS,)), logprobs.new_empty(())
    block, num_warps = BLOCKS["policy_terms float64" if logprobs.dtype == torch.float64 else "policy_terms"]
    report_block, report_warps = BLOCKS["policy_sums"]
    with on_device(logprobs):
        if count:
            kernels.policy_terms_sweep[(count,)](
                logprobs,
                old_logprobs,
                ref_logprobs,
                rollout_logprobs,
                entropy,
                advantages,
                words(mask),
                words(keep),
                offsets,
                slopes,
                entropy_slopes,
                partials,
                width,
                total,
                bits(clip_low),
                bits(clip_high),
                bits(dual_clip),
                bits(kl_coef),
                bits(entropy_coef),
                bits(tis_cap),
                bits(icepop_low),
                bits(icepop_high),
                TERM=term,
                KL=kl_estimator,
                PER_TOKEN=per_token,
                MEAN_OF_TOKENS=aggregation == 1,
                DUAL=dual_clip > 0,
                TIS=tis_cap > 0,
                ICEPOP=icepop_high > 0,
                SEQUENCE_CORRECTION=sequence_correction and (tis_cap > 0 or icepop_high > 0),
                ALIGNED=width % 16 == 0,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
        sums.policy_terms_report[(1,)](
            partials,
            denominator,
            loss,
            metrics,
            scale,
            count,
            bits(divisor),
            bits(kl_coef),
            bits(entropy_coef),
            TERM=term,
            AGGREGATION=aggregation,
            OLD=old_logprobs is not None,
            REF=ref_logprobs is not None,
            ENTROPY=entropy is not None,
            ROLLOUT=rollout_logprobs is not None,
            CORRECTS=tis_cap > 0 or icepop_high > 0,
            BLOCK=report_block,
            num_warps=report_warps,
            enable_fp_fusion=True,
        )
    return loss, metrics, slopes, entropy_slopes, scale


def positive(denominator: Tensor) -> float:
    """The value of a denominator on the CPU; ValueError unless it is positive."""
    value = float(denominator)
    if not value > 0:
        raise ValueError(f"denominator is {value}; expected a positive count or constant")
    return value
