"""The Triton token_stats: allocates and launches, and asks nothing of the device.

Arguments are the registered ops', as in _token_stats_cpu.py. What only the data can tell is not checked, as that would
stall the GPU: a row with a label outside the vocabulary, or with a temperature that is no positive number, is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irlfast.ops._dispatch import as_rows, row_layout
from irlfast.ops._triton import Block, block_for, on_device, power_of_two

# The gradient needs every pair of a row's labels.
MAX_LABELS = 1024


def statistics_triton(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_distribution: bool,
    *,
    with_state: bool,
    block: Block | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The forward launch. Entropy and lse, and the state, are None where they are not asked for."""
    from irlfast.kernels.token_stats import token_stats_forward

    several = labels.ndim == logits.ndim
    per_row = _labels_per_row(labels) if several else 1
    data, (outer, inner, outer_stride, inner_stride) = as_rows(logits)
    rows, vocab = outer * inner, logits.shape[-1]
    labels = labels.contiguous()
    logprob = torch.empty_like(labels, dtype=torch.float32)
    entropy = lse = state = None
    if with_distribution:
        row = logprob.new_empty(logits.shape[:-1]) if several else logprob
        entropy, lse = torch.empty_like(row), torch.empty_like(row)
    if with_state:
        state = logprob.new_empty(3, rows)
    if rows > 0:
        block = block or block_for("token_stats", data.device.index, data.element_size(), vocab)
        with on_device(data):
            token_stats_forward[(rows,)](
                data,
                labels,
                row_temperature,
                logprob,
                entropy,
                lse,
                state,
                rows,
                vocab,
                inner,
                outer_stride,
                inner_stride,
                per_row,
                ignore_index,
                float(temperature),  # of an int Triton would make a constant, and a kernel for each
                float(softcap),
                softcap != 0.0,
                power_of_two(per_row),
                block.lanes,
                block.vector,
                num_warps=block.num_warps,
                num_stages=block.num_stages,
                enable_fp_fusion=True,
            )
    return logprob, entropy, lse, state


def backward_triton(
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
    block: Block | None = None,
) -> Tensor:
    """The backward launch, into a new contiguous tensor unless it is told where.

    `gradient` may be the logits themselves; it has a row layout without overlap.
    """
    from irlfast.kernels.token_stats import token_stats_backward

    if gradient is None:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    gradient_layout = row_layout(gradient)
    assert gradient_layout is not None
    per_row = _labels_per_row(labels) if labels.ndim == logits.ndim else 1
    vocab = logits.shape[-1]
    logits, (outer, inner, outer_stride, inner_stride) = as_rows(logits)
    rows = outer * inner
    if rows > 0:
        block = block or block_for("token_stats", logits.device.index, logits.element_size(), vocab)
        with on_device(logits):
            token_stats_backward[(rows,)](
                logits,
                labels.contiguous(),
                row_temperature,
                state,
                None if grad_logprob is None else grad_logprob.contiguous(),
                None if grad_entropy is None else grad_entropy.contiguous(),
                None if grad_lse is None else grad_lse.contiguous(),
                gradient,
                rows,
                vocab,
                inner,
                outer_stride,
                inner_stride,
                *gradient_layout[1:],
                per_row,
                ignore_index,
                float(temperature),  # of an int Triton would make a constant, and a kernel for each
                float(softcap),
                softcap != 0.0,
                power_of_two(per_row),
                block.lanes,
                block.vector,
                num_warps=block.num_warps,
                num_stages=block.num_stages,
                enable_fp_fusion=True,
            )
    return gradient


def backward_over_logits_triton(logits: Tensor, *arguments: Any) -> None:
    """The backward launch, written over the logits."""
    backward_triton(logits, *arguments, gradient=logits)


def _labels_per_row(labels: Tensor) -> int:
    count = labels.shape[-1]
    if count > MAX_LABELS:
        raise ValueError(
            f"the Triton kernel takes at most {MAX_LABELS} labels a row, not {count}; use impl='reference'"
        )
    return count
