"""policy_terms by Triton: two launches forward; backward scales what they leave. Arguments are the registered op's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops._aggregation import positive
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
    if old_logprobs is not None:
        old_logprobs = old_logprobs.contiguous()
    if ref_logprobs is not None:
        ref_logprobs = ref_logprobs.contiguous()
    if rollout_logprobs is not None:
        rollout_logprobs = rollout_logprobs.contiguous()
    if entropy is not None:
        entropy = entropy.contiguous()
    if keep is not None:
        keep = keep.contiguous()
    offsets, count, width, total = layout(logprobs.shape, cu_seqlens)
    slopes = torch.empty_like(logprobs) if with_gradient else None
    bonus = with_gradient and entropy is not None and entropy_coef != 0
    entropy_slopes = torch.empty_like(logprobs) if bonus else None
    partials = logprobs.new_empty((count, sums.PARTIALS.value), dtype=torch.float64)
    loss, metrics, scale = logprobs.new_empty(()), logprobs.new_empty((sums.METRICS,)), logprobs.new_empty(())
    launch = _launch(
        logprobs.dtype is torch.float64, per_token, width % 16 == 0, term, clip_low, clip_high, dual_clip, kl_coef,
        kl_estimator, entropy_coef, tis_cap, icepop_low, icepop_high, sequence_correction, aggregation,
        old_logprobs is not None, ref_logprobs is not None, entropy is not None, rollout_logprobs is not None
    )  # fmt: skip
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
                *launch.sweep,
                **launch.sweep_options,
            )
        sums.policy_terms_report[(1,)](
            partials, denominator, loss, metrics, scale, count, bits(divisor), *launch.report, **launch.report_options
        )
    return loss, metrics, slopes, entropy_slopes, scale


class _Launch(NamedTuple):
    """What the two launches take beside tensors and sizes: the kernels' other arguments, and Triton's options."""

    sweep: tuple[int, ...]
    sweep_options: dict[str, Any]
    report: tuple[int, ...]
    report_options: dict[str, Any]


@lru_cache(maxsize=256)  # a run's options are the same in every call, and putting them together takes longer than that
def _launch(
    double: bool,
    per_token: bool,
    aligned: bool,
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
    old: bool,
    ref: bool,
    entropy: bool,
    rollout: bool,
) -> _Launch:
    block, num_warps = BLOCKS["policy_terms float64" if double else "policy_terms"]
    report_block, report_warps = BLOCKS["policy_sums"]
    corrects = tis_cap > 0 or icepop_high > 0
    numbers = (clip_low, clip_high, dual_clip, kl_coef, entropy_coef, tis_cap, icepop_low, icepop_high)
    constants = {
        "TERM": term,
        "KL": kl_estimator,
        "PER_TOKEN": per_token,
        "MEAN_OF_TOKENS": aggregation == 1,
        "DUAL": dual_clip > 0,
        "TIS": tis_cap > 0,
        "ICEPOP": icepop_high > 0,
        "SEQUENCE_CORRECTION": sequence_correction and corrects,
        "ALIGNED": aligned,
        "BLOCK": block,
    }
    report_constants = {
        "TERM": term,
        "AGGREGATION": aggregation,
        "OLD": old,
        "REF": ref,
        "ENTROPY": entropy,
        "ROLLOUT": rollout,
        "CORRECTS": corrects,
        "BLOCK": report_block,
    }
    return _Launch(
        (*map(bits, numbers), *constants.values()),
        {"num_warps": num_warps, "enable_fp_fusion": True},
        (bits(kl_coef), bits(entropy_coef), *report_constants.values()),
        {"num_warps": report_warps, "enable_fp_fusion": True},
    )
