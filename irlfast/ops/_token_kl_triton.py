"""The Triton token_kl: allocates and launches, and asks nothing of the device. Arguments are the registered ops'.

A row with a temperature that is no positive number is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import as_rows, row_layout
from irlfast.ops._token_kl_cpu import STATE
from irlfast.ops._triton import Block, block_for, on_device

_FORWARD = _native.DIVERGENCES["forward"]
_MIXED = _native.DIVERGENCES["js"]


def forward_triton(
    logits: Tensor,
    ref_logits: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    kind: int,
    js_weight: float,
    inplace_backward: bool = False,
    *,
    block: Block | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence [...] and the state [6, rows] float64; `inplace_backward` concerns autograd alone."""
    from irlfast.kernels.token_kl import token_kl_forward

    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    rows, vocab = kl.numel(), logits.shape[-1]
    state = logits.new_empty((STATE, rows), dtype=torch.float64)
    p, q = (ref_logits, logits) if kind == _FORWARD else (logits, ref_logits)
    p, p_layout = as_rows(p)
    q, q_layout = as_rows(q)
    if rows > 0:
        block = block or block_for("token_kl", p.device.index, p.element_size(), vocab)
        with on_device(p):
            token_kl_forward[(rows,)](
                p,
                q,
                row_temperature,
                kl,
                state,
                rows,
                vocab,
                *p_layout[1:],
                *q_layout[1:],
                float(temperature),  # of an int Triton would make a constant, and a kernel for each
                float(softcap),
                js_weight,
                kind == _MIXED,
                softcap != 0.0,
                block.lanes,
                block.vector,
                num_warps=block.num_warps,
                num_stages=block.num_stages,
                enable_fp_fusion=True,
            )
    return kl, state


def backward_triton(
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
    block: Block | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the reference's, each in a new contiguous tensor, or [0] where it is not wanted.

    `gradient`, where the first goes instead, may be the logits themselves; it has a row layout without overlap.
    """
    from irlfast.kernels.token_kl import token_kl_backward

    if gradient is None and of_logits:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ref_gradient = torch.empty_like(ref_logits, memory_format=torch.contiguous_format) if of_ref_logits else None
    vocab = logits.shape[-1]
    sides = [(logits, gradient), (ref_logits, ref_gradient)]
    (p, p_gradient), (q, q_gradient) = reversed(sides) if kind == _FORWARD else sides
    p, p_layout = as_rows(p)
    q, q_layout = as_rows(q)
    rows = p_layout[0] * p_layout[1]
    if rows > 0 and (of_logits or of_ref_logits):
        block = block or block_for("token_kl", p.device.index, p.element_size(), vocab)
        with on_device(p):
            token_kl_backward[(rows,)](
                p,
                q,
                row_temperature,
                state,
                upstream.contiguous(),
                p_gradient,
                q_gradient,
                rows,
                vocab,
                *p_layout[1:],
                *q_layout[1:],
                *_layout(p_gradient),
                *_layout(q_gradient),
                float(temperature),  # of an int Triton would make a constant, and a kernel for each
                float(softcap),
                js_weight,
                kind == _MIXED,
                softcap != 0.0,
                block.lanes,
                block.vector,
                num_warps=block.num_warps,
                num_stages=block.num_stages,
                enable_fp_fusion=True,
            )
    nothing = logits.new_empty(0)
    return nothing if gradient is None else gradient, nothing if ref_gradient is None else ref_gradient


def _layout(gradient: Tensor | None) -> tuple[int, int, int]:
    if gradient is None:
        return 1, 0, 0
    layout = row_layout(gradient)
    assert layout is not None
    return layout[1:]
