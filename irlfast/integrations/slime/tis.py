"""Corrections for a sampler that is not quite the policy: truncated importance sampling and IcePop, as slime has it.

With r = exp(train - rollout) of a token, or of the sum over its response, and (lo, hi) = (tis_clip_low, tis_clip), each
token's policy term is multiplied by

    tis       min(r, hi), and not less than lo                         Yao et al. 2025
    icepop    r where lo <= r <= hi, else 0                            Ling team 2025

as `irlfast.losses.policy_loss` does with tis_cap = hi and icepop_band = (lo, hi).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.ops.policy_terms import MAX_LOG_RATIO

Corrected = tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]


def tis(
    args: Any,
    *,
    pg_loss: Tensor,  # (N)
    train_log_probs: Sequence[Tensor],  # of (R_i)
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **kwargs: Any,
) -> Corrected:
    """Truncated importance sampling: --custom-tis-function-path irlfast.integrations.slime.tis, with --use-tis.

    Args:
        args: tis_clip, tis_clip_low; and irlfast_tis_level, "token" (the default) or "sequence".
        pg_loss: [N] each response token's policy term, sample after sample.
        train_log_probs, rollout_log_probs: of each sample, its tokens' under the trained model and as sampled.
        loss_masks: of each sample, 1 on tokens that count.
        kwargs: whatever else slime passes.

    Returns:
        The corrected terms; the masks as they came; per token the ratio ("tis"), whether it was cut ("tis_clipfrac")
        and its distance from 1 ("tis_abs"), which slime averages and logs.

    Raises:
        ValueError: an unknown level, or "sequence" where a response is spread over context-parallel ranks.
    """
    ratio = _ratio(args, train_log_probs, rollout_log_probs, loss_masks)
    weight = ratio.clamp(min=getattr(args, "tis_clip_low", 0.0), max=args.tis_clip)
    return pg_loss * weight, loss_masks, _metrics(ratio, weight)


def icepop(
    args: Any,
    *,
    pg_loss: Tensor,  # (N)
    train_log_probs: Sequence[Tensor],  # of (R_i)
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **kwargs: Any,
) -> Corrected:
    """IcePop: --custom-tis-function-path irlfast.integrations.slime.icepop, with --use-tis; else as `tis`."""
    ratio = _ratio(args, train_log_probs, rollout_log_probs, loss_masks)
    outside = (ratio < getattr(args, "tis_clip_low", 0.0)) | (ratio > args.tis_clip)
    weight = torch.where(outside, 0.0, ratio)
    return torch.where(outside, 0.0, pg_loss * weight), loss_masks, _metrics(ratio, weight)


def _ratio(args: Any, train: Sequence[Tensor], rollout: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """[N] r of each token, detached; as in `ops.policy_terms`, at most exp(20)."""
    level = getattr(args, "irlfast_tis_level", "token")
    gaps = [(new.detach() - sampled.detach()) for new, sampled in zip(train, rollout, strict=True)]
    if level == "sequence":
        for index, (gap, mask) in enumerate(zip(gaps, masks, strict=True)):
            if len(gap) != len(mask):
                raise ValueError(
                    f"irlfast_tis_level is 'sequence' and this rank has {len(gap)} of sample {index}'s {len(mask)} "
                    "response tokens (context parallelism): use 'token'"
                )
        gaps = [torch.where(mask.bool(), gap, 0.0).sum().expand_as(gap) for gap, mask in zip(gaps, masks, strict=True)]
    elif level != "token":
        raise ValueError(f"irlfast_tis_level is {level!r}; expected 'token' or 'sequence'")
    return torch.exp(torch.cat(gaps).clamp(max=MAX_LOG_RATIO))


def _metrics(ratio: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"tis": ratio, "tis_clipfrac": (weight != ratio).to(ratio.dtype), "tis_abs": (ratio - 1).abs()}
