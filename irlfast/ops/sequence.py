"""Log-probability of whole sequences from the log-probabilities of their tokens.

    sum:  L_i = sum_t m_it logp_it                mean:  L_i = sum_t m_it logp_it / sum_t m_it

over the unmasked tokens of sequence i. Padded rows and packed sequences give the same numbers. A sequence without an
unmasked token has L = 0 and gradient 0 under either reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import cuda_unavailable, on_gpu
from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    Kernels,
    address,
    cpu_kernel_unavailable,
    runs_undispatched,
    select,
    statistics_dtype,
)
from irlfast.ops._segments import (
    check_offsets_form,
    checked_offsets,
    compute_dtype,
    native_mask,
    native_segments,
    offsets_beside,
    require_floating,
    segment_sum,
)
from irlfast.ops._segments_triton import triton_takes
from irlfast.ops._sequence_cuda import backward_cuda, forward_cuda
from irlfast.ops._sequence_triton import backward_triton, forward_triton

REDUCTIONS = ("sum", "mean")


def sequence_logprobs_reference(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """The definition, one sequence after the other in float64. Arguments and shapes as `sequence_logprobs`."""
    if cu_seqlens is None:
        rows = [(logprobs[i], None if mask is None else mask[i]) for i in range(logprobs.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        rows = [(logprobs[span], None if mask is None else mask[span]) for span in spans]
    results = []
    for values, row_mask in rows:
        kept = values if row_mask is None else values[row_mask.bool()]
        total = kept.double().sum()
        results.append(total / len(kept) if reduction == "mean" and len(kept) else total)
    return torch.stack(results) if results else logprobs.new_zeros(0, dtype=torch.float64)


LIBRARY.define("sequence_logprobs(Tensor logprobs, Tensor? mask, Tensor? cu_seqlens, bool mean) -> Tensor")
LIBRARY.define(
    "sequence_logprobs_backward(Tensor grad, Tensor? mask, Tensor? cu_seqlens, bool mean, SymInt[] shape, "
    "ScalarType dtype) -> Tensor"
)


def forward_cpu(
    logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool, *, isa: str = "auto"
) -> Tensor:
    """The native forward; `isa` names the instruction set, for tests."""
    logprobs = logprobs.contiguous()
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = native_segments(logprobs.shape, cu_seqlens)
    result = logprobs.new_empty((segments[0],), dtype=statistics_dtype(logprobs.dtype))
    _native.sequence_logprobs_forward(
        *segments,
        logprobs.data_ptr(),
        DTYPE_CODES[logprobs.dtype],
        address(mask),
        mask_bytes,
        mask_floating,
        mean,
        result.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    del held
    return result


def backward_cpu(
    grad: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    isa: str = "auto",
) -> Tensor:
    """The native gradient with respect to log-probs of this shape and dtype."""
    grad = grad.contiguous()
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = native_segments(shape, cu_seqlens)
    gradient = grad.new_empty(shape, dtype=dtype)
    _native.sequence_logprobs_backward(
        *segments,
        grad.data_ptr(),
        DTYPE_CODES[dtype],
        address(mask),
        mask_bytes,
        mask_floating,
        mean,
        gradient.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    del held
    return gradient


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, mask, cu_seqlens, ctx.mean = inputs
    ctx.shape, ctx.dtype = logprobs.shape, logprobs.dtype
    ctx.save_for_backward(mask, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    run = torch.ops.irlfast.sequence_logprobs_backward
    return run(grad, *ctx.saved_tensors, ctx.mean, ctx.shape, ctx.dtype), None, None, None


class _SequenceLogprobs(torch.autograd.Function):
    """The registered op without the dispatcher, which costs more than the kernel on a small batch."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *inputs: Any) -> Tensor:
        output: Tensor = kernels.forward(*inputs)
        ctx.kernels = kernels
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not runs_undispatched(grad):
            return None, *_backward(ctx, grad)
        return None, ctx.kernels.backward(grad, *ctx.saved_tensors, ctx.mean, ctx.shape, ctx.dtype), None, None, None


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, cu_seqlens, ctx.mean, _, _ = inputs
    ctx.save_for_backward(mask, cu_seqlens)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    """The op is linear: its gradient's derivative is the op itself."""
    return torch.ops.irlfast.sequence_logprobs(grad, *ctx.saved_tensors, ctx.mean), None, None, None, None, None


def _forward_fake(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool) -> Tensor:
    count = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return logprobs.new_empty((count,), dtype=statistics_dtype(logprobs.dtype))


def _backward_fake(
    grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


LIBRARY.impl("sequence_logprobs", forward_cpu, "CPU")
LIBRARY.impl("sequence_logprobs_backward", backward_cpu, "CPU")
LIBRARY.impl("sequence_logprobs", on_gpu(forward_cuda, forward_triton), "CUDA")
LIBRARY.impl("sequence_logprobs_backward", on_gpu(backward_cuda, backward_triton), "CUDA")
torch.library.register_fake("irlfast::sequence_logprobs", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::sequence_logprobs_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("irlfast::sequence_logprobs", _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd(
    "irlfast::sequence_logprobs_backward", _second_backward, setup_context=_save_for_second, lib=LIBRARY
)


def _run(kernels: Kernels, logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool) -> Tensor:
    cu_seqlens = offsets_beside(cu_seqlens, logprobs)
    run: Callable[..., Tensor] = torch.ops.irlfast.sequence_logprobs
    if runs_undispatched(logprobs):
        wanted = logprobs.requires_grad and torch.is_grad_enabled()
        run = partial(_SequenceLogprobs.apply, kernels) if wanted else kernels.forward
    return run(logprobs, mask, cu_seqlens, mean)


def _run_reference(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mean: bool) -> Tensor:
    """All sequences at once, on any device."""
    real = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    # Selected, not multiplied: 0 * NaN is NaN.
    values = torch.where(real, logprobs, 0.0)
    if cu_seqlens is None:
        total = values.double().sum(dim=1)
        count = real.sum(dim=1)
    else:
        offsets = checked_offsets(cu_seqlens, logprobs.shape[0], logprobs.device)
        total = segment_sum(values, offsets)
        count = segment_sum(real, offsets)
    if mean:
        total = total / count.clamp(min=1)
    return total.to(compute_dtype(logprobs))


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run, Kernels(forward_cpu, backward_cpu)), unavailable=cpu_kernel_unavailable),
    "cuda": Implementation(run=partial(_run, Kernels(forward_cuda, backward_cuda)), unavailable=cuda_unavailable),
    "triton": Implementation(run=partial(_run, Kernels(forward_triton, backward_triton)), unavailable=triton_takes),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


def sequence_logprobs(
    logprobs: Tensor,  # (B, T), or packed (N)
    mask: Tensor | None = None,  # shaped as logprobs
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1)
    reduction: Literal["sum", "mean"] = "sum",
    impl: str = "auto",
) -> Tensor:  # (B)
    """Sum or mean of token log-probabilities over each sequence, in nats.

    Args:
        logprobs: [B, T] padded, or [N] packed with `cu_seqlens`.
        mask: non-zero on the tokens that count, shaped as logprobs; None counts all. What stands at a masked
            position, NaN and infinities included, has no influence and receives gradient 0.
        cu_seqlens: [B + 1] integer offsets, int32 or int64; sequence i is
            logprobs[cu_seqlens[i]:cu_seqlens[i + 1]].
        reduction: "sum", or "mean" over the unmasked tokens.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [B] float32 (float64 for float64 input), accumulated in float64, so that neither the layout nor the amount
        of padding shows in the result. Differentiable.

    Raises:
        TypeError: logprobs is not floating point, or cu_seqlens is not integer.
        ValueError: shapes or devices that do not fit, an unknown reduction, or offsets that do not rise from 0 to
            N. The values of offsets on a GPU are not looked at, which would stall; they are clamped to the tensor.
        RuntimeError: an `impl` that is not available here.
    """
    if not logprobs.is_floating_point():
        require_floating(logprobs=logprobs)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS}")
    if mask is not None and mask.shape != logprobs.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected that of logprobs, {tuple(logprobs.shape)}")
    if mask is not None and mask.device != logprobs.device:
        raise ValueError(f"mask is on {mask.device}, logprobs on {logprobs.device}; move one to the other")
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens)
    if logprobs.ndim != (2 if cu_seqlens is None else 1):
        layout = "padded [B, T]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}; expected {layout}")
    implementation = select("sequence_logprobs", IMPLEMENTATIONS, impl, logprobs)
    result: Tensor = implementation.run(logprobs, mask, cu_seqlens, reduction == "mean")
    return result
