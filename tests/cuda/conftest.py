"""Two ways to run a CUDA kernel: on a GPU, and in the emulation, where the same source is compiled for the CPU.

The fixture `device` gives a test both: "cpu" under the mark `emulated`, which takes a native module of its own and so
a second pytest (test_emulation.py starts it), and "cuda" on a GPU. Most tests are those of the Triton kernels, as a
kernel's name is all that differs: reuse.py takes them from tests/kernels, and there impl="triton" is the CUDA kernel.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from irlfast import _native

HERE = Path(__file__).parent
# The last is the checkout, for bench: at the end, so that `irlfast` is still the installed one.
sys.path += [str(HERE), str(HERE.parent / "kernels"), str(HERE.parents[1])]

EMULATED = _native.build_info()["cuda_emulated"]
OPS = ("token_stats", "token_kl", "sequence", "importance", "policy_terms")


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.emulated), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the emulation, or "cuda"."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _triton_means_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not getattr(request.function, "of_triton", False):
        return
    for op in OPS:
        table = importlib.import_module(f"irlfast.ops.{op}").IMPLEMENTATIONS
        monkeypatch.setitem(table, "triton", table["cuda"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if item.path.is_relative_to(HERE)]
    for item in own:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    elsewhere = [item for item in own if item.get_closest_marker("emulated") is not None and not EMULATED]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in set(elsewhere)]
