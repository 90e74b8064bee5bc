"""The CUDA kernels' source compiled for the CPU, under this folder's tests: once as it is, and once with each break.

A block's threads run as fibers, in an order that turns round at every barrier; see csrc/cuda/emulation/cuda_on_host.h.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import irlfast

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

Build = Callable[[Path], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """From a project's folder to its native module; what has been compiled once is compiled anew where it changed."""
    pybind11 = pytest.importorskip("pybind11", reason='pybind11 is missing: pip install -e ".[dev]"')
    for tools in (("cmake",), ("c++", "g++")):
        if not any(shutil.which(tool, path=SEARCH_PATH) for tool in tools):
            pytest.skip(f"{tools[0]} is not on PATH")
    folder = tmp_path_factory.mktemp("emulation")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=SEARCH_PATH) else []
    options = {
        "IRLFAST_CUDA": "EMULATE",
        # Debug takes half the time of Release to compile, and the tests twice as long.
        "CMAKE_BUILD_TYPE": "Debug",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        "SKBUILD_PROJECT_VERSION": irlfast.__version__,
    }

    def build(source: Path) -> Path:
        configure = ["cmake", "-S", str(source), "-B", str(folder), *generator]
        run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        run(["cmake", "--build", str(folder), "--parallel", "2"])
        (module,) = folder.glob("_native*.so")
        return module

    return build


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is compiled."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": SEARCH_PATH},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def emulated_tests(module: Path, *selection: str) -> tuple[int, str]:
    """The status and the output of a pytest with that native module."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulation", "-m", "emulated"]
    environment = {
        **os.environ,
        "IRLFAST_EMULATION": str(module),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, str(HERE), *selection],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    return done.returncode, done.stdout


def test_kernels_pass_the_truth_tables(build: Build, source: Path) -> None:
    status, output = emulated_tests(build(source))
    assert status == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed.group(1)) >= 700


# What is broken, how, and the tests that have to notice.
BREAKS = {
    "the argmax is in the sum": (
        "token_stats.cu",
        "x[k] = here ? minus_infinity<Real>() : x[k];",
        "",
        "test_confident_token_keeps_its_digits",
    ),
    "a barrier is missing": (
        "token_stats.cu",
        "    __syncthreads();\n    const Split split",
        "    const Split split",
        "test_gradient_in_place_has_the_same_bits",
    ),
    "single elements are left out": (
        "common/logits.cuh",
        "split.singles = vocab - split.packs * kWidth;",
        "split.singles = split.head;",
        "test_rows_at_any_address and token_stats",
    ),
    "sums are not moved to a new maximum": (
        "token_kl.cu",
        "if (q_max > s.q.max) online_softmax_raise(s.q, q_max, inverse_temperature);",
        "s.q.max = q_max;",
        "test_every_size_of_block and token_kl",
    ),
    "offsets are taken as they come": (
        "common/segments.cuh",
        "return {begin, clamp_offset(offset_of(segments, i + 1), begin, tokens)};",
        "return {begin, offset_of(segments, i + 1) > tokens ? tokens - 1 : offset_of(segments, i + 1)};",
        "test_offsets_that_leave_a_gap",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(build: Build, source: Path, what: str) -> None:
    file, text, replacement, selection = BREAKS[what]
    path = source / "csrc" / "cuda" / file
    whole = path.read_text()
    assert whole.count(text) == 1
    path.write_text(whole.replace(text, replacement))
    try:
        status, output = emulated_tests(build(source), "-k", selection, "-x")
    finally:
        path.write_text(whole)
    assert status == 1, output[-8000:]
    assert "1 failed" in output
