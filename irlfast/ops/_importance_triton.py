"""importance_weights by Triton: one launch a pass, after torch has sorted the ids where there are groups.

How many groups there are, only the data can tell: with ids, forward reads that one number back, once its kernel is
under way. Backward does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from irlfast.ops._segments import rows_by_group
from irlfast.ops._segments_triton import BLOCKS, bits
from irlfast.ops._triton import on_device


def _reshapes(low: float, high: float, temper: float) -> bool:
    """Whether weights are any other than the shares of the ratios as they are."""
    return temper != 1 or low != -math.inf or high != math.inf


def forward_triton(
    log_target: Tensor, log_proposal: Tensor, groups: Tensor | None, low: float, high: float, temper: float
) -> tuple[Tensor, Tensor, Tensor]:
    from irlfast.kernels import importance as kernels

    log_target, log_proposal = log_target.contiguous(), log_proposal.contiguous()
    rows = log_target.shape[0]
    order, offsets, last = (None, None, None) if groups is None else rows_by_group(groups)
    most = 1 if groups is None else rows
    weights = torch.empty_like(log_target)
    log_normalizer, ess = log_target.new_empty((most,)), log_target.new_empty((most,))
    block, num_warps = BLOCKS["importance"]
    if rows:
        with on_device(log_target):
            kernels.importance_forward[(most,)](
                log_target,
                log_proposal,
                order,
                offsets,
                weights,
                log_normalizer,
                ess,
                rows,
                bits(low),
                bits(high),
                bits(temper),
                RESHAPES=_reshapes(low, high, temper),
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    if last is None:
        return weights, log_normalizer, ess
    count = int(last) + 1
    return weights, log_normalizer[:count], ess[:count]


def backward_triton(
    log_target: Tensor,
    log_proposal: Tensor,
    groups: Tensor | None,
    low: float,
    high: float,
    temper: float,
    grad_weights: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_ess: Tensor | None,
) -> Tensor:
    """The gradient to log_target; its negative is that to log_proposal."""
    from irlfast.kernels import importance as kernels

    log_target, log_proposal = log_target.contiguous(), log_proposal.contiguous()
    grad_weights, grad_log_normalizer, grad_ess = (
        None if x is None else x.contiguous() for x in (grad_weights, grad_log_normalizer, grad_ess)
    )
    rows = log_target.shape[0]
    order, offsets, _ = (None, None, None) if groups is None else rows_by_group(groups)
    gradient = torch.empty_like(log_target)
    count = 1 if groups is None else rows
    for one_a_group in (grad_log_normalizer, grad_ess):
        count = count if one_a_group is None else one_a_group.shape[0]
    block, num_warps = BLOCKS["importance"]
    if rows:
        with on_device(log_target):
            kernels.importance_backward[(count,)](
                log_target,
                log_proposal,
                order,
                offsets,
                grad_weights,
                grad_log_normalizer,
                grad_ess,
                gradient,
                rows,
                bits(low),
                bits(high),
                bits(temper),
                RESHAPES=_reshapes(low, high, temper),
                BLOCK=block,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return gradient
