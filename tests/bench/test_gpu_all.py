"""bench/gpu_all.sh with an interpreter that only writes down what it is asked: no stage stops the ones after it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_all.sh"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="a script for GPU machines, which run Linux"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def interpreter(tmp_path: Path, *fails: str, gpu: bool = True) -> Path:
    """One that succeeds but where its arguments have one of these words in them."""
    words = [*fails, *([] if gpu else ["torch.cuda.is_available"])]
    file = tmp_path / "python"
    lines = ["#!/bin/sh", f'echo "$*" >> {tmp_path}/calls', "echo the output", 'case "$*" in']
    lines += [f'  *"{word}"*) echo went wrong; exit 3 ;;' for word in words]
    file.write_text("\n".join([*lines, "esac", ""]))
    file.chmod(0o755)
    return file


def calls(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text()


def test_it_is_valid_and_can_be_run() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert SCRIPT.stat().st_mode & 0o100
    assert "set -u" in SCRIPT.read_text()


def test_every_stage_runs_and_leaves_its_log(tmp_path: Path) -> None:
    done = run("--python", interpreter(tmp_path), "--minutes", "2.5", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "versions.log", "build.log", "import.log", "tests.log", "bench.log", "bench-triton.log", "summary.txt",
    }  # fmt: skip
    said = calls(tmp_path)
    assert "-m pip install --no-index --no-deps --no-build-isolation -e ." in said
    assert f"-m pytest -q -m gpu -p no:cacheprovider --junitxml {out}/tests.xml tests/kernels tests/cuda" in said
    assert f"-m bench gpu --budget-minutes 2.5 --json {out}/gpu.json --plot {out}/gpu.png" in said
    assert done.stdout.splitlines()[-1] == "every stage succeeded"
    assert (out / "summary.txt").read_text().splitlines()[-1] == "every stage succeeded"


@pytest.mark.parametrize("word", ["pip install", "import irlfast.ops", "-m pytest", "-m bench"])
def test_a_stage_that_fails_stops_none_and_is_seen_in_the_exit_code(tmp_path: Path, word: str) -> None:
    done = run("--python", interpreter(tmp_path, word), tmp_path / "out")
    assert done.returncode == 1
    failed = 2 if word == "-m bench" else 1  # with and without the CUDA kernels
    assert done.stdout.splitlines()[-1] == f"{failed} stages FAILED"
    assert "FAILED with code 3" in (tmp_path / "out" / "summary.txt").read_text()
    assert "went wrong" in done.stdout
    assert "-m bench gpu" in calls(tmp_path)


def test_what_a_build_needs_and_is_missing_is_named(tmp_path: Path) -> None:
    done = run("--python", interpreter(tmp_path, "find_spec"), tmp_path / "out")
    assert done.returncode == 1
    assert "build: FAILED, missing: scikit-build-core pybind11" in done.stdout
    assert "tests: FAILED, pytest is missing" in done.stdout
    assert "pip install" not in calls(tmp_path)
    assert "-m bench gpu" in calls(tmp_path)


def test_wheels_are_installed_from_their_folder_before_the_build(tmp_path: Path) -> None:
    wheels = tmp_path / "some wheels"
    wheels.mkdir()
    (wheels / "pybind11-3.0-py3-none-any.whl").touch()
    done = run("--python", interpreter(tmp_path), "--wheels", wheels, tmp_path / "out")
    assert done.returncode == 0
    said = calls(tmp_path)
    assert f"pip install --no-index --no-deps --find-links {wheels} {wheels}/pybind11-3.0-py3-none-any.whl" in said
    assert said.index("pybind11-3.0") < said.index("-e .")


def test_without_a_gpu_no_test_runs_and_that_is_said(tmp_path: Path) -> None:
    done = run("--python", interpreter(tmp_path, gpu=False), "--no-build", tmp_path / "out")
    assert done.returncode == 0
    assert "there is nothing to test or measure on one" in done.stdout
    assert "-m pytest" not in calls(tmp_path)


def test_options_leave_stages_out(tmp_path: Path) -> None:
    done = run("--python", interpreter(tmp_path), "--no-build", "--no-tests", "--no-bench", tmp_path / "out")
    assert done.returncode == 0
    assert not {"pip", "pytest", "bench"} & set(calls(tmp_path).split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage"),
        (["--wheels"], "--wheels needs a value"),
        (["--fast", "out"], "--fast is no option"),
        (["one", "two"], "one folder OUT"),
        (["--minutes", "x", "out"], "--minutes x is no number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bench/gpu_all.sh [options] OUT")
