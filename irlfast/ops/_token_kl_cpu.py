"""The native token_kl on CPU tensors. Arguments are the registered ops'; `isa` names the instruction set, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES, RowLayout, address, as_rows, row_layout, statistics_dtype
from irlfast.ops._token_stats_cpu import check_row_temperature, new_gradient

# Doubles a row that the gradient needs.
STATE = 6

_NO_ROWS: RowLayout = (0, 0, 0, 0)


def forward_cpu(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    kind: int,
    js_weight: float,
    inplace_backward: bool = False,
    *,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The divergence [...] and the state [6, rows] float64; `inplace_backward` concerns autograd alone."""
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    dtype = logits.dtype
    kl = logits.new_empty(logits.shape[:-1], dtype=statistics_dtype(dtype))
    state = logits.new_empty((STATE, kl.numel()), dtype=torch.float64)
    logits, layout = as_rows(logits)
    ref_logits, ref_layout = as_rows(ref_logits)
    _native.token_kl_forward(
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
        torch.get_num_threads(),
        isa,
    )
    return kl, state


def backward_cpu(
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
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the reference's, each in a new contiguous tensor, or [0] where it is not wanted.

    `gradient`, where the first goes instead, may be the logits themselves; it has a row layout without overlap.
    """
    if gradient is None:
        gradient = new_gradient(logits) if of_logits else logits.new_empty(0)
    ref_gradient = new_gradient(ref_logits) if of_ref_logits else logits.new_empty(0)
    gradient_layout = row_layout(gradient) if of_logits else _NO_ROWS
    ref_gradient_layout = row_layout(ref_gradient) if of_ref_logits else _NO_ROWS
    assert gradient_layout is not None
    assert ref_gradient_layout is not None
    logits, layout = as_rows(logits)
    ref_logits, ref_layout = as_rows(ref_logits)
    upstream = upstream.contiguous()
    _native.token_kl_backward(
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
        gradient.data_ptr() if of_logits else 0,
        gradient_layout,
        ref_gradient.data_ptr() if of_ref_logits else 0,
        ref_gradient_layout,
        torch.get_num_threads(),
        isa,
    )
    return gradient, ref_gradient
