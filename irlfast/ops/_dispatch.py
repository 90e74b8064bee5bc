"""How an op finds its implementation, and how a tensor crosses into native code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast import _native

# Definitions are added where each op is; registering them is what importing irlfast.ops does.
LIBRARY = torch.library.Library("irlfast", "FRAGMENT")

DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in _native.DTYPES.items()}

# (outer, inner, outer_stride, inner_stride): row r begins at (r // inner) * outer_stride + (r % inner) * inner_stride.
RowLayout = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        run: the function, with the op's own arguments.
        unavailable: says why it cannot run on a tensor, or None where it can.
    """

    run: Callable[..., Any]
    unavailable: Callable[[Tensor], str | None]


class Kernels(NamedTuple):
    """An op's two passes, as the registered ops take their arguments."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def not_in_this_release(kind: str) -> Implementation:
    """An entry for a kernel that does not exist yet, so that asking for it says so."""

    def run(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"no {kind} kernel in this release")

    return Implementation(run=run, unavailable=lambda tensor: f"this release has no {kind} kernel for it")


def select(op: str, table: Mapping[str, Implementation], impl: str, tensor: Tensor) -> Implementation:
    """The implementation named `impl`, or for "auto" the first in `table` that can run on `tensor`.

    Raises:
        ValueError: `impl` is no name in `table`.
        RuntimeError: the implementation asked for by name is not available; the message says why.
    """
    if impl == "auto":
        for candidate in table.values():
            if candidate.unavailable(tensor) is None:
                return candidate
        raise RuntimeError(f"{op}: no implementation can run on {tensor.dtype} on {tensor.device}")
    if impl not in table:
        raise ValueError(f"{op}: impl={impl!r} is unknown; expected 'auto' or one of {', '.join(map(repr, table))}")
    reason = table[impl].unavailable(tensor)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} is not available: {reason}; use impl='auto'")
    return table[impl]


def cpu_kernel_unavailable(tensor: Tensor) -> str | None:
    """Why the native CPU kernels cannot take a tensor."""
    if not tensor.is_cpu:
        return f"the tensor is on {tensor.device}, the kernel runs on the CPU"
    if tensor.dtype not in DTYPE_CODES:
        return f"the tensor is {tensor.dtype}, the kernel takes {', '.join(map(str, DTYPE_CODES))}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, and the kernel has no rule for those"
    return None


def runs_undispatched(tensor: Tensor) -> bool:
    """Whether a kernel may be called without torch's dispatcher: a plain tensor, and nobody tracing."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: statistics are never kept in 16 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_layout(tensor: Tensor) -> RowLayout | None:
    """A [..., V] tensor as rows of adjacent elements, at two strides.

    Enough for slices such as logits[:, :-1] and transposed leading dimensions. None where the last dimension is not
    adjacent, or the leading ones need more strides than two.
    """
    vocab = tensor.shape[-1]
    if tensor.is_contiguous():
        return 1, tensor.numel() // vocab if vocab else 0, 0, vocab
    if vocab > 1 and tensor.stride(-1) != 1:
        return None
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return None
    sizes = [1] * (2 - len(sizes)) + sizes
    strides = [0] * (2 - len(strides)) + strides
    return sizes[0], sizes[1], strides[0], strides[1]


def rows_overlap(layout: RowLayout, vocab: int) -> bool:
    """Whether two rows of a layout share elements."""
    extent = vocab
    for stride, size in sorted([(layout[2], layout[0]), (layout[3], layout[1])]):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def as_rows(tensor: Tensor) -> tuple[Tensor, RowLayout]:
    """The tensor and its row layout; a copy where its own strides have none."""
    layout = row_layout(tensor)
    if layout is None:
        tensor = tensor.contiguous()
        layout = 1, tensor.numel() // tensor.shape[-1], 0, tensor.shape[-1]
    return tensor, layout


def address(tensor: Tensor | None) -> int:
    """data_ptr(), or 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
