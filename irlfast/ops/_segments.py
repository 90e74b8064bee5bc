"""Reductions over ragged segments and groups of a vector, the same from run to run on every device.

Sums run in float64 over torch.segment_reduce, whose order is fixed; scatter-adds use float atomics on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {groups.dtype}; expected integer group ids")
        if groups.shape != values.shape:
            raise ValueError(f"{name} has shape {tuple(groups.shape)}; expected one id a row, {tuple(values.shape)}")
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
