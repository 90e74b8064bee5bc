"""One op has one name everywhere: its module, test, kernels and benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def stems(folder: str, pattern: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(pattern) if not path.stem.startswith("_")}


OPS = stems("irlfast/ops", "*.py")
KERNELS = stems("csrc/cpu", "*.cpp") | stems("csrc/cuda", "*.cu") | stems("kernels", "*.py")


def test_the_tree_is_where_it_is_looked_for() -> None:
    assert "token_stats" in OPS & KERNELS


@pytest.mark.parametrize("op", sorted(OPS))
def test_op_has_a_test(op: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()


@pytest.mark.parametrize("op", sorted(OPS))
def test_op_with_a_kernel_has_a_reference_and_a_benchmark(op: str) -> None:
    """One without is plain torch: its own specification."""
    source = (ROOT / "irlfast" / "ops" / f"{op}.py").read_text()
    if op not in KERNELS:
        assert "_native" not in source
        return
    # A module may be named shorter than its function: sequence has sequence_logprobs.
    names = vars(importlib.import_module(f"irlfast.ops.{op}"))
    assert any(name.startswith(op) and name.endswith("_reference") and callable(names[name]) for name in names)
    assert (ROOT / "bench" / f"{op}.py").is_file()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_kernel_names_an_op(kernel: str) -> None:
    assert kernel in OPS
