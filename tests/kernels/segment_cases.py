"""Sequences that break kernels over segments; kernels in narrow blocks; kernels broken on purpose."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# Lengths in blocks of 16, as `narrow` sets them: ragged, empty, single; a whole block and one token more. On a GPU,
# where the blocks are as they are, LONG crosses them.
RAGGED = [17, 0, 16, 1, 35]
LONG = [1025, 1024, 0, 1, 4099]

BLOCK = 16
MODULES = ("policy_terms", "_policy_sums", "importance", "sequence", "gae")


def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: there every kernel gets blocks of 16 tokens, which short sequences cross."""
    if request.node.get_closest_marker("interpreter") is None:
        return
    for name in MODULES:
        module = importlib.import_module(f"irlfast.kernels.{name}")
        wide = module.BLOCK
        # Three sequences a block of the report: RAGGED crosses it.
        block = dict.fromkeys(wide, BLOCK) if isinstance(wide, dict) else 2 if name == "_policy_sums" else BLOCK
        monkeypatch.setattr(module, "BLOCK", block)


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


def put_broken(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, sound: str, broken: str) -> None:
    """Put into use the kernels with one line of `irlfast/kernels/NAME.py` changed."""
    changed = importlib.import_module(f"irlfast.kernels.{name}")
    source = Path(str(changed.__file__)).read_text()
    assert source.count(sound) == 1, f"{sound!r} is {source.count(sound)} times in {name}.py"
    path = folder / f"{name}.py"
    path.write_text(source.replace(sound, broken))
    _put(monkeypatch, name, path, changed)
    if name == "_segments":
        # Those that took the sound function when they were imported.
        for other in MODULES:
            module = importlib.import_module(f"irlfast.kernels.{other}")
            _put(monkeypatch, other, Path(str(module.__file__)), module)


def _put(monkeypatch: pytest.MonkeyPatch, name: str, path: Path, replaced: ModuleType) -> None:
    full_name = f"irlfast.kernels.{name}"
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(replaced, "BLOCK"):
        module.BLOCK = replaced.BLOCK  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, full_name, module)
    monkeypatch.setattr(sys.modules["irlfast.kernels"], name, module)
