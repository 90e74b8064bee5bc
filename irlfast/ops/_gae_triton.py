"""gae by Triton: one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.ops._segments_triton import BLOCKS, bits, layout, words
from irlfast.ops._triton import on_device


def gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; rewards and values contiguous, in the type of the results."""
    from irlfast.kernels import gae as kernels

    offsets, count, width, total = layout(rewards.shape, cu_seqlens)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    block, num_warps = BLOCKS["gae"]
    if total and count:
        with on_device(rewards):
            kernels.gae[(count,)](
                rewards,
                values,
                words(mask),
                last_values,
                offsets,
                advantages,
                returns,
                width,
                total,
                bits(gamma),
                bits(lam),
                ALIGNED=width % 16 == 0,
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return advantages, returns
