"""The native token_stats on CPU tensors: checks what only the data can tell, allocates, and crosses the boundary.

Arguments are the registered ops': labels int64, [...] or [..., K]; row_temperature, where given, replaces temperature,
one a row, contiguous, in the statistics' type; softcap 0 means none. `isa` names the instruction set to use, for tests;
`_native.build_info()` lists them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from irlfast import _native
from irlfast.memory import WARM_FROM, warm_empty
from irlfast.ops._dispatch import DTYPE_CODES, address, as_rows, row_layout, statistics_dtype


def statistics_cpu(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_distribution: bool,
    *,
    with_state: bool,
    isa: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The native forward. Entropy and lse, and the state, are None where they are not asked for.

    On a small batch allocating the results takes longer than computing them. So: as few as possible, sized as another
    tensor or by numbers, which costs half of what a torch.Size does; and empty_like, new_empty rather than empty, which
    would follow the default device.
    """
    vocab = logits.shape[-1]
    several = labels.ndim == logits.ndim
    data, layout = as_rows(logits)
    labels = labels.contiguous()
    wrong = _native.first_invalid_label(labels.data_ptr(), labels.numel(), vocab, ignore_index)
    if wrong >= 0:
        raise_label(labels, wrong, vocab, ignore_index)
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    logprob = torch.empty_like(labels, dtype=statistics_dtype(data.dtype), memory_format=torch.contiguous_format)
    entropy = lse = state = None
    if with_distribution:
        row = logprob.new_empty(logits.shape[:-1]) if several else logprob
        entropy, lse = torch.empty_like(row), torch.empty_like(row)
    if with_state:
        state = logprob.new_empty(3, layout[0] * layout[1])
    _native.token_stats_forward(
        data.data_ptr(),
        DTYPE_CODES[data.dtype],
        layout,
        vocab,
        labels.data_ptr(),
        labels.shape[-1] if several else 1,
        ignore_index,
        temperature,
        address(row_temperature),
        softcap,
        logprob.data_ptr(),
        address(entropy),
        address(lse),
        address(state),
        torch.get_num_threads(),
        isa,
    )
    return logprob, entropy, lse, state


def backward_cpu(
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
    isa: str = "auto",
) -> Tensor:
    """The native gradient, in a new contiguous tensor unless it is told where.

    `gradient` may be the logits themselves; it has a row layout without overlap.
    """
    if gradient is None:
        gradient = new_gradient(logits)
    gradient_layout = row_layout(gradient)
    assert gradient_layout is not None
    vocab = logits.shape[-1]
    logits, layout = as_rows(logits)
    labels = labels.contiguous()
    if grad_logprob is not None:
        grad_logprob = grad_logprob.contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    _native.token_stats_backward(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        layout,
        vocab,
        labels.data_ptr(),
        labels.shape[-1] if labels.ndim == logits.ndim else 1,
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
        torch.get_num_threads(),
        isa,
    )
    return gradient


def new_gradient(logits: Tensor) -> Tensor:
    """A contiguous tensor like the logits, not yet written."""
    if logits.numel() * logits.element_size() >= WARM_FROM:
        return warm_empty(logits.shape, logits.dtype)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def backward_over_logits(logits: Tensor, *arguments: Any) -> None:
    """The native gradient, written over the logits."""
    backward_cpu(logits, *arguments, gradient=logits)


def raise_label(labels: Tensor, position: int, vocab: int, ignore_index: int) -> None:
    index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(position), labels.shape))
    value = int(labels.reshape(-1)[position])
    raise IndexError(f"labels[{index}] = {value} is outside [0, {vocab}) and is not ignore_index ({ignore_index})")


def check_row_temperature(temperature: Tensor) -> None:
    valid = (temperature > 0) & (temperature < math.inf)
    if not bool(valid.all()):
        position = int((~valid).flatten().nonzero()[0])
        value = float(temperature.reshape(-1)[position])
        raise ValueError(f"temperature of row {position} = {value} is not a positive finite number")
