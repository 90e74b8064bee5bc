"""Installed from the wheel and editable, and configured with and without nvcc."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

LOOK = """
import json
import irlfast, irlfast.kernels, irlfast.ops, torch
from irlfast import _native
logits, labels = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 6, 3])
ours, reference = (irlfast.ops.token_stats(logits, labels, impl=impl) for impl in ("cpu", "reference"))
files = {module.__name__: module.__file__ for module in (irlfast, irlfast.kernels, _native)}
error = max(float((a - b).abs().max()) for a, b in zip(ours, reference))
print(json.dumps({"files": files, "error": error, "build": _native.build_info(), "gpus": _native.cuda_device_count()}))
"""


@pytest.fixture(scope="module")
def install(
    new_environment: Callable[[], Path], run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Installs into an environment of its own; returns what importing irlfast there shows, seen from outside."""

    def install(*what: str | Path, env: dict[str, str]) -> dict[str, Any]:
        python = new_environment()
        options = ["--quiet", "--no-deps", "--no-build-isolation"]
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, env=env)
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        shown = json.loads(run(python, "-c", LOOK, env=env, cwd=elsewhere).stdout)
        help_text = run(python.parent / "irlfast", "--help", env=env, cwd=elsewhere).stdout
        assert all(command in help_text for command in ("demo", "bilevel", "doctor"))
        return {**shown, "prefix": python.parents[1]}

    return install


def test_wheel_imports_with_its_kernels(
    wheel: Path, install: Callable[..., dict[str, Any]], environment: dict[str, str]
) -> None:
    shown = install(wheel, env=environment)
    assert shown["error"] < 1e-12
    # With CUDA kernels where nvcc is, and then too on a machine without a driver.
    assert shown["build"]["cuda_built"] == (shutil.which("nvcc", path=environment["PATH"]) is not None)
    assert shown["gpus"] == torch.cuda.device_count()
    for file in shown["files"].values():
        assert Path(file).is_relative_to(shown["prefix"])
    assert shown["files"]["irlfast.kernels"].endswith("irlfast/kernels/__init__.py")


def test_editable_install_reads_the_sources_and_builds_without_nvcc(
    source: Path, install: Callable[..., dict[str, Any]], without_nvcc: dict[str, str]
) -> None:
    # A debug build takes half the time.
    shown = install("--config-settings=cmake.build-type=Debug", "--editable", source, env=without_nvcc)
    assert shown["error"] < 1e-12
    assert shown["files"]["irlfast"] == str(source / "irlfast" / "__init__.py")
    assert shown["files"]["irlfast.kernels"] == str(source / "kernels" / "__init__.py")
    assert Path(shown["files"]["irlfast._native"]).is_relative_to(shown["prefix"])
    assert shown["build"]["cuda_built"] is False
    assert shown["build"]["cuda_compiler"] == ""


@pytest.fixture
def configure(source: Path, tmp_path: Path, run: Callable[..., Any]) -> Callable[..., str]:
    """Runs CMake's configuration alone; returns all it printed."""

    def configure(cuda: str, env: dict[str, str], status: int = 0) -> str:
        options = [f"-DIRLFAST_CUDA={cuda}", "-DIRLFAST_PYTHON=OFF"]
        done = run("cmake", "-S", source, "-B", tmp_path, *options, env=env, status=status)
        return str(done.stdout + done.stderr)

    return configure


def test_cuda_on_without_nvcc_is_refused_with_the_way_out(
    configure: Callable[..., str], without_nvcc: dict[str, str]
) -> None:
    message = " ".join(configure("ON", without_nvcc, status=1).split())
    assert "IRLFAST_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH, set CUDACXX" in message


def test_cuda_auto_without_nvcc_goes_on_without_it(configure: Callable[..., str], without_nvcc: dict[str, str]) -> None:
    assert "Looking for a CUDA compiler - NOTFOUND" in configure("AUTO", without_nvcc)


def test_cuda_off_does_not_look_for_nvcc(configure: Callable[..., str], environment: dict[str, str]) -> None:
    assert "CUDA" not in configure("OFF", environment)
