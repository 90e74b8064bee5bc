"""Sequences that break kernels over segments; and kernels in narrow blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.ops import _segments_triton
from irlfast.ops._segments_triton import BLOCKS

# Lengths in blocks of 16, as `narrow` sets them: ragged, empty, single; a whole block and one token more. On a GPU,
# where the blocks are as they are, LONG crosses them.
RAGGED = [17, 0, 16, 1, 35]
LONG = [1025, 1024, 0, 1, 4099]


def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: there every kernel gets blocks of 16 tokens, which short sequences cross."""
    if request.node.get_closest_marker("interpreter") is None:
        return
    for name in BLOCKS:
        # Of the sums of sequences two: RAGGED crosses that.
        monkeypatch.setitem(BLOCKS, name, (2 if name == "policy_sums" else 16, 4))


def unlooked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets offsets on the CPU pass as those on a GPU do."""
    monkeypatch.setattr(_segments_triton, "checked_offsets", lambda cu_seqlens, total, device: cu_seqlens)


def pack(padded: Tensor, lengths: list[int]) -> Tensor:
    """[B, T] -> [N]: the same sequences without their padding."""
    return padded[torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]]


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def sequences(lengths: list[int], padding: int = 3) -> tuple[Tensor, Callable[..., Tensor]]:
    """A mask with holes, and a function that draws values in float64, NaN wherever it is False."""
    width = max(lengths) + padding
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask &= torch.rand(mask.shape) > 0.2

    def draw(scale: float = 1.0, centre: Tensor | float = 0.0) -> Tensor:
        values = torch.randn(mask.shape, dtype=torch.float64) * scale + centre
        return torch.where(mask, values, torch.nan)

    return mask, draw


def to(device: str, dtype: torch.dtype, inputs: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the device, those of floating point in the dtype."""
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def exactly(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values on the CPU in float64."""
    return {
        name: x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
