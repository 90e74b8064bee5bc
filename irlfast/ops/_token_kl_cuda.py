"""The CUDA token_kl: allocates and launches, and asks nothing of the device. Arguments are the registered ops'."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import queue
from irlfast.ops._dispatch import DTYPE_CODES, RowLayout, address, as_rows, row_layout, statistics_dtype
from irlfast.ops._token_kl_cpu import STATE


def forward_cuda(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    kind: int,
    js_weight: float,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """The divergence [...] and the state [6, rows] float64; `inplace_backward` concerns autograd alone."""
    dtype = logits.dtype
    kl = logits.new_empty(logits.shape[:-1], dtype=statistics_dtype(dtype))
    state = logits.new_empty((STATE, kl.numel()), dtype=torch.float64)
    logits, layout = as_rows(logits)
    ref_logits, ref_layout = as_rows(ref_logits)
    _native.cuda_token_kl_forward(
        logits.data_ptr(),
        ref_logits.data_ptr(),
        DTYPE_CODES[dtype],
        layout,
        ref_layout,
        logits.shape[-1],
        kind,
        js_weight,
        temperature,
        address(row_temperature),
        softcap,
        kl.data_ptr(),
        state.data_ptr(),
        *queue(logits),
    )
    return kl, state


def backward_cuda(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    kind: int,
    js_weight: float,
    state: Tensor,
    upstream: Tensor,
    of_logits: bool,
    of_ref_logits: bool,
    *,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the reference's, each in a new contiguous tensor, or [0] where it is not wanted.

    `gradient`, where the first goes instead, may be the logits themselves; it has a row layout without overlap.
    """
    if gradient is None and of_logits:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ref_gradient = torch.empty_like(ref_logits, memory_format=torch.contiguous_format) if of_ref_logits else None
    logits, layout = as_rows(logits)
    ref_logits, ref_layout = as_rows(ref_logits)
    upstream = upstream.contiguous()
    _native.cuda_token_kl_backward(
        logits.data_ptr(),
        ref_logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        layout,
        ref_layout,
        logits.shape[-1],
        kind,
        js_weight,
        temperature,
        address(row_temperature),
        softcap,
        state.data_ptr(),
        upstream.data_ptr(),
        address(gradient),
        _layout(gradient),
        address(ref_gradient),
        _layout(ref_gradient),
        *queue(logits),
    )
    nothing = logits.new_empty(0)
    return nothing if gradient is None else gradient, nothing if ref_gradient is None else ref_gradient


def _layout(gradient: Tensor | None) -> RowLayout:
    if gradient is None:
        return 0, 0, 0, 0
    layout = row_layout(gradient)
    assert layout is not None
    return layout
