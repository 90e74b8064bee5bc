"""The native kernels under each sanitizer, without Python around them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The tools that were installed beside this Python come first, whether its environment was activated or not.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    cmake = shutil.which("cmake", path=SEARCH_PATH)
    if cmake is None:
        pytest.skip('cmake is neither on PATH nor beside this Python: pip install "irlfast[dev]"')
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is on PATH")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=SEARCH_PATH) else []
    options = {
        "IRLFAST_PYTHON": "OFF",
        "IRLFAST_NATIVE_TESTS": "ON",
        # A thread of a CUDA kernel is a fiber, which the thread sanitizer knows nothing of.
        "IRLFAST_CUDA": "OFF" if sanitizers == "thread" else "EMULATE",
        "IRLFAST_SANITIZE": sanitizers,
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": "-O1",
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), *generator]
    run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    run([cmake, "--build", str(tmp_path), "--parallel", "2"])
    report = run([str(tmp_path / "irlfast_native_tests")])
    assert " 0 failures" in report
    assert "runtime error" not in report
    assert "AddressSanitizer" not in report
    assert "ThreadSanitizer" not in report


def run(command: list[str]) -> str:
    environment = {**os.environ, "PATH": SEARCH_PATH}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout
