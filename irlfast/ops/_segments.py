"""Reductions over ragged segments and groups of a vector, the same from run to run on every device.

Sums run in float64 over torch.segment_reduce, whose order is fixed; scatter-adds use float atomics on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native

# Bytes of an element, and whether it is floating point, of the masks that native code reads as they are.
MASK_WORDS: dict[torch.dtype, tuple[int, bool]] = {
    torch.bool: (1, False),
    torch.uint8: (1, False),
    torch.int8: (1, False),
    torch.int16: (2, False),
    torch.int32: (4, False),
    torch.int64: (8, False),
    torch.float16: (2, True),
    torch.bfloat16: (2, True),
    torch.float32: (4, True),
    torch.float64: (8, True),
}

# (count, width, offsets, wide_offsets) as native code takes sequences; the tensor behind `offsets` must be held.
SegmentLayout = tuple[int, int, int, bool]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type results are given in: float64 where any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def require_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor")


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum values[offsets[i]:offsets[i + 1]]: values [N], offsets [G + 1] -> [G] float64; an empty segment gives 0."""
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True, initial=0)


def native_mask(mask: Tensor | None) -> tuple[Tensor | None, int, bool]:
    """A mask that native code can read, with its element's bytes and whether that is floating point."""
    if mask is None:
        return None, 1, False
    if mask.dtype not in MASK_WORDS:
        mask = mask.bool()
    return mask.contiguous(), *MASK_WORDS[mask.dtype]


def native_segments(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[Tensor | None, SegmentLayout]:
    """The sequences of a padded [B, T] or packed [N] tensor, and the offsets to hold while they are in use.

    Raises:
        ValueError: offsets that do not rise from 0 to N.
    """
    if cu_seqlens is None:
        return None, (shape[0], shape[1], 0, True)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        cu_seqlens = cu_seqlens.long()
    cu_seqlens = cu_seqlens.contiguous()
    count, wide = cu_seqlens.shape[0] - 1, cu_seqlens.dtype == torch.int64
    wrong = _native.first_invalid_offset(cu_seqlens.data_ptr(), wide, count, shape[0])
    if wrong != -1:
        raise_offsets(cu_seqlens, wrong, shape[0])
    return cu_seqlens, (count, 0, cu_seqlens.data_ptr(), wide)


def raise_offsets(cu_seqlens: Tensor, wrong: int, total: int) -> None:
    """`wrong`: the sequence whose offset falls, or -2 where an end is another."""
    if wrong == -2:
        raise ValueError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; expected from 0 to {total}, the "
            "length of logprobs"
        )
    raise ValueError(
        f"cu_seqlens falls from {int(cu_seqlens[wrong])} to {int(cu_seqlens[wrong + 1])} at sequence {wrong}"
    )


def check_offsets_form(cu_seqlens: Tensor) -> None:
    """TypeError or ValueError unless it is a vector of integers, not empty; its values are not looked at."""
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected integer offsets")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [B + 1] offsets")


def checked_offsets(cu_seqlens: Tensor, total: int, device: torch.device) -> Tensor:
    """int64 offsets into `total` packed values, on `device`. From a GPU they are clamped, as looking would stall."""
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
            raise_offsets(cu_seqlens, -2, total)
        if len(falls):
            raise_offsets(cu_seqlens, int(falls[0, 0]), total)
        return cu_seqlens.to(device, torch.int64)
    return cu_seqlens.to(device, torch.int64).clamp(0, total).cummax(0).values


def offsets_beside(cu_seqlens: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Offsets on the device of packed `tokens` [N], as a registered op takes them."""
    if cu_seqlens is None or cu_seqlens.device == tokens.device:
        return cu_seqlens
    return cu_seqlens.cpu() if tokens.is_cpu else checked_offsets(cu_seqlens, tokens.shape[0], tokens.device)


class Sequences:
    """The sequences of a padded [B, T] tensor, or of a packed [N] one with offsets; in plain torch."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        self.shape = tokens.shape
        self.offsets: Tensor | None = None
        if cu_seqlens is not None:
            self.offsets = checked_offsets(cu_seqlens, tokens.shape[0], tokens.device)

    def sum(self, values: Tensor) -> Tensor:
        """Tokens' values -> [B] float64."""
        return values.double().sum(dim=1) if self.offsets is None else segment_sum(values, self.offsets)

    def spread(self, values: Tensor) -> Tensor:
        """[B] -> each sequence's value at all of its tokens."""
        if self.offsets is None:
            return values[:, None].expand(self.shape)
        position = torch.arange(self.shape[0], device=values.device)
        index = torch.searchsorted(self.offsets[1:], position, right=True)
        return values[index.clamp(max=len(values) - 1)]


def check_groups(groups: Tensor, values: Tensor, *, name: str = "groups") -> None:
    """TypeError or ValueError unless `groups` has an integer for each row of `values` [N]."""
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {groups.dtype}; expected integer group ids")
    if groups.shape != values.shape:
        raise ValueError(f"{name} has shape {tuple(groups.shape)}; expected one id a row, {tuple(values.shape)}")


def rows_by_group(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows group by group; where each group begins, [N + 1], N for groups that are not there; the last group's number.

    Stable, so that a group's sums run over its rows in their own order wherever the other groups' rows stand.
    """
    ids, order = torch.sort(groups, stable=True)
    number = torch.zeros_like(ids)
    torch.cumsum(ids[1:] != ids[:-1], 0, out=number[1:])
    every = torch.arange(len(ids) + 1, device=ids.device)
    return order, torch.searchsorted(number, every), number[-1]


class Groups:
    """Rows that share an integer id, in any order.

    ids [G]: the distinct ids, ascending; index [N]: which of them each row has; counts [G]: rows of each.
    """

    def __init__(self, groups: Tensor) -> None:
        """groups [N], any integer dtype."""
        self.ids, self.index, self.counts = torch.unique(groups, return_inverse=True, return_counts=True)
        # Stable, so that a group's sum runs over its rows in their own order wherever the other groups' rows stand.
        self.order = torch.argsort(self.index, stable=True)
        self.offsets = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))

    @classmethod
    def of(cls, groups: Tensor | None, values: Tensor, *, name: str = "groups") -> Groups:
        """Groups of the rows of `values` [N]; None makes one group of them all."""
        if groups is None:
            return cls(torch.zeros(values.shape, dtype=torch.int64, device=values.device))
        check_groups(groups, values, name=name)
        return cls(groups.to(values.device))

    def sum(self, values: Tensor) -> Tensor:
        """[N] -> [G] float64."""
        return segment_sum(values[self.order], self.offsets)

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> [G] float64."""
        return self.sum(values) / self.counts

    def max(self, values: Tensor) -> Tensor:
        """[N] -> [G] in the dtype of values, not differentiable."""
        return torch.segment_reduce(values.detach()[self.order], "max", offsets=self.offsets, unsafe=True)

    def logsumexp(self, values: Tensor) -> Tensor:
        """[N] -> [G] float64. A group that is -inf throughout gives -inf, with gradient 0."""
        peak = self.max(values).double()
        peak = torch.where(torch.isneginf(peak), 0.0, peak)
        total = self.sum(torch.exp(values.double() - peak[self.index]))
        empty = total == 0
        return torch.where(empty, -torch.inf, peak + torch.log(torch.where(empty, 1.0, total)))
