"""The Triton kernels' tests, for the CUDA kernels; see conftest.py."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"


def reuse(module: str, *, but: tuple[str, ...] = ()) -> dict[str, Callable[..., Any]]:
    """The tests of tests/kernels/`module`, less those of Triton's interpreter and those named in `but`."""
    # By its path: the module here has the same name.
    spec = importlib.util.spec_from_file_location(f"tests_of_triton_{module}", KERNELS / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    tests: dict[str, Callable[..., Any]] = {}
    for name, test in inspect.getmembers(loaded, inspect.isfunction):
        marks = {mark.name for mark in getattr(test, "pytestmark", [])}
        if name.startswith("test_") and "interpreter" not in marks and name not in but:
            test.of_triton = True  # type: ignore[attr-defined]
            tests[name] = test
    assert tests
    return tests
