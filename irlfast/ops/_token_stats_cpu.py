"""The native token_stats on CPU tensors: checks what only the data can tell, allocates, and crosses the boundary.

Arguments are the registered ops': labels int64, [...] or [..., K]; row_temperature, where given, replaces temperature,
one a row, contiguous, in the statistics' type; softcap 0 means none. `isa` names the instruction set to use, for tests;
`_native.build_info()` lists them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES, address, as_rows, row_layout, statistics_dtype

# Two huge pages: below that there may be none inside.
_HUGE_PAGES_FROM = 4 << 20

# logprob, entropy, lse and what the gradient needs of each row, [3, rows].
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def forward_cpu(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool = False,
    *,
    isa: str = "auto",
) -> Statistics:
    """The native forward; `inplace_backward` concerns autograd alone."""
    rows_shape = logits.shape[:-1]
    vocab = logits.shape[-1]
    logits, layout = as_rows(logits)
    labels = labels.contiguous()
    wrong = _native.first_invalid_label(labels.data_ptr(), labels.numel(), vocab, ignore_index)
    if wrong >= 0:
        raise_label(labels, wrong, vocab, ignore_index)
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    dtype = statistics_dtype(logits.dtype)
    rows = layout[0] * layout[1]
    # new_empty, not torch.empty: beside the logits, whatever the default device.
    logprob = logits.new_empty(labels.shape, dtype=dtype)
    entropy = logits.new_empty(rows_shape if with_entropy else (0,), dtype=dtype)
    lse = logits.new_empty(rows_shape, dtype=dtype)
    state = logits.new_empty((3, rows), dtype=dtype)
    _native.token_stats_forward(
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
        logprob.data_ptr(),
        entropy.data_ptr() if with_entropy else 0,
        lse.data_ptr(),
        state.data_ptr(),
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
    grad_logprob, grad_entropy, grad_lse = (
        None if g is None else g.contiguous() for g in (grad_logprob, grad_entropy, grad_lse)
    )
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
    """A contiguous tensor like the logits, not yet written, on huge pages where it is large."""
    gradient = logits.new_empty(logits.shape)
    nbytes = gradient.numel() * gradient.element_size()
    if nbytes >= _HUGE_PAGES_FROM:
        _native.advise_huge_pages(gradient.data_ptr(), nbytes)
    return gradient


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
