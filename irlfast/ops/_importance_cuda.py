"""importance_weights by CUDA: one launch a pass, after torch has sorted the ids where there are groups.

How many groups there are, only the data can tell: with ids, forward reads that one number back, once its kernel is
under way. Backward does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import queue
from irlfast.ops._dispatch import DTYPE_CODES, address
from irlfast.ops._segments import rows_by_group


def forward_cuda(
    log_target: Tensor, log_proposal: Tensor, groups: Tensor | None, low: float, high: float, temper: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_target, log_proposal = log_target.contiguous(), log_proposal.contiguous()
    rows = log_target.shape[0]
    order, offsets, last = (None, None, None) if groups is None else rows_by_group(groups)
    most = 1 if groups is None else rows
    weights = torch.empty_like(log_target)
    log_normalizer, ess = log_target.new_empty((most,)), log_target.new_empty((most,))
    _native.cuda_importance_weights_forward(
        log_target.data_ptr(),
        log_proposal.data_ptr(),
        DTYPE_CODES[log_target.dtype],
        rows,
        address(order),
        address(offsets),
        most,
        low,
        high,
        temper,
        weights.data_ptr(),
        log_normalizer.data_ptr(),
        ess.data_ptr(),
        *queue(log_target),
    )
    if last is None:
        return weights, log_normalizer, ess
    count = int(last) + 1
    return weights, log_normalizer[:count], ess[:count]


def backward_cuda(
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
    _native.cuda_importance_weights_backward(
        log_target.data_ptr(),
        log_proposal.data_ptr(),
        DTYPE_CODES[log_target.dtype],
        rows,
        address(order),
        address(offsets),
        count,
        low,
        high,
        temper,
        address(grad_weights),
        address(grad_log_normalizer),
        address(grad_ess),
        gradient.data_ptr(),
        *queue(log_target),
    )
    return gradient
