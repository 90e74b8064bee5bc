"""The CUDA token_stats: allocates and launches, and asks nothing of the device.

Arguments are the registered ops', as in _token_stats_cpu.py. What only the data can tell is not checked, as that would
stall the GPU: a row with a label outside the vocabulary, or with a temperature that is no positive number, is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import queue
from irlfast.ops._dispatch import DTYPE_CODES, address, as_rows, row_layout, statistics_dtype


def statistics_cuda(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_distribution: bool,
    *,
    with_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The forward launch. Entropy and lse, and the state, are None where they are not asked for."""
    several = labels.ndim == logits.ndim
    per_row = labels.shape[-1] if several else 1
    _check_labels_per_row(per_row)
    data, layout = as_rows(logits)
    labels = labels.contiguous()
    logprob = torch.empty_like(labels, dtype=statistics_dtype(data.dtype), memory_format=torch.contiguous_format)
    entropy = lse = state = None
    if with_distribution:
        row = logprob.new_empty(logits.shape[:-1]) if several else logprob
        entropy, lse = torch.empty_like(row), torch.empty_like(row)
    if with_state:
        state = logprob.new_empty(3, layout[0] * layout[1])
    _native.cuda_token_stats_forward(
        data.data_ptr(),
        DTYPE_CODES[data.dtype],
        layout,
        logits.shape[-1],
        labels.data_ptr(),
        per_row,
        ignore_index,
        temperature,
        address(row_temperature),
        softcap,
        logprob.data_ptr(),
        address(entropy),
        address(lse),
        address(state),
        *queue(data),
    )
    return logprob, entropy, lse, state


def backward_cuda(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    state: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    *,
    gradient: Tensor | None = None,
) -> Tensor:
    """The backward launch, into a new contiguous tensor unless it is told where.

    `gradient` may be the logits themselves; it has a row layout without overlap.
    """
    if gradient is None:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    gradient_layout = row_layout(gradient)
    assert gradient_layout is not None
    per_row = labels.shape[-1] if labels.ndim == logits.ndim else 1
    _check_labels_per_row(per_row)
    vocab = logits.shape[-1]
    logits, layout = as_rows(logits)
    labels = labels.contiguous()
    grad_logprob, grad_entropy, grad_lse = (
        None if x is None else x.contiguous() for x in (grad_logprob, grad_entropy, grad_lse)
    )
    _native.cuda_token_stats_backward(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        layout,
        vocab,
        labels.data_ptr(),
        per_row,
        ignore_index,
        temperature,
        address(row_temperature),
        softcap,
        state.data_ptr(),
        address(grad_logprob),
        address(grad_entropy),
        address(grad_lse),
        gradient.data_ptr(),
        gradient_layout,
        *queue(logits),
    )
    return gradient


def backward_over_logits_cuda(logits: Tensor, *arguments: Any) -> None:
    """The backward launch, written over the logits."""
    backward_cuda(logits, *arguments, gradient=logits)


def _check_labels_per_row(count: int) -> None:
    if count > _native.CUDA_MAX_LABELS:
        raise ValueError(
            f"token_stats: the CUDA kernel takes at most {_native.CUDA_MAX_LABELS} labels a row, not {count}; split "
            "them, or use impl='reference'"
        )
