"""Three ways to run a Triton kernel: in Triton's interpreter, compiled for a GPU that is not there, and on one that is.

A test marked `interpreter` runs in a second pytest, as Triton decides on import whether to interpret; its outcome is
shown here as if it had run here. All of them share that one process, which runs beside the other tests; with
`pytest -n`, those of a file do. The fixture `device` gives a test both ways: "cpu" in the interpreter and "cuda" on a
GPU, where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# The helpers beside this file: triton_compile, triton_cases and so on.
sys.path.append(str(Path(__file__).parent))

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REPORT = "IRLFAST_INTERPRETER_REPORT"
INSTALLED = importlib.util.find_spec("triton") is not None


class Interpreter:
    """A second pytest that runs the chosen tests in Triton's interpreter."""

    def __init__(self, config: pytest.Config, chosen: list[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="irlfast-interpreter-"))
        self._outcomes: dict[str, dict[str, str]] | None = None
        report = self._folder / "report"
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(config.rootpath)]
        with (self._folder / "output").open("w") as output:
            self._process = subprocess.Popen(
                [*command, *chosen],
                cwd=config.rootpath,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def outcomes(self) -> dict[str, dict[str, str]]:
        """By the tests' names; waits for the process."""
        if self._outcomes is None:
            self._process.wait()
            report = self._folder / "report"
            lines = report.read_text().splitlines() if report.exists() else []
            reports: list[dict[str, Any]] = [json.loads(line) for line in lines]
            # A failure in the set-up or the tear-down of a test counts as one of the test.
            reports.sort(key=lambda report: report["outcome"] == "failed")
            self._outcomes = {report["test"]: report for report in reports}
        return self._outcomes

    def output(self) -> str:
        return (self._folder / "output").read_text()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder)


# By the names of the tests.
_interpreters: dict[str, Interpreter] = {}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter is slow: every kernel gets blocks of 16 lanes, which small rows cross."""
    from irlfast.ops import _triton

    monkeypatch.setattr(_triton, "as_block", lambda config, bytes_: _triton.Block(16, 16 // bytes_, 4, 1))
    _triton.block_for.cache_clear()
    yield
    _triton.block_for.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the kernel with products inside: four rows, and 8 of their elements, are a tile."""
    from irlfast.kernels._tuning import ProductConfig
    from irlfast.ops import _linear_fused_triton as fused

    def small(hidden: torch.Tensor, weight: torch.Tensor) -> ProductConfig:
        aligned = fused.begins_at_16_bytes(hidden) and fused.begins_at_16_bytes(weight)
        return ProductConfig(4, 512, 8, 256, 4, 4, 1, descriptors=aligned)

    monkeypatch.setattr(fused, "config_for", small)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the interpreter with small blocks, or "cuda"."""
    if request.param == "cpu":
        request.getfixturevalue("small_blocks")
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    # What the interpreter computes on purpose, such as inf - inf, numpy warns of.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy")
    if INTERPRETING and INSTALLED:
        _patch_language_once_a_launch()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if not INSTALLED:
            item.add_marker(pytest.mark.skip(reason='Triton is not installed: pip install -e ".[dev]"'))
        elif item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    # The interpreter's last: it has a process of its own, beside which the others run.
    items.sort(key=lambda item: item.path.is_relative_to(HERE) and _interpreted(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    # A worker of pytest-xdist does not know which of the tests it will be given.
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        _start_interpreter(session, HERE)


def _start_interpreter(session: pytest.Session, where: Path) -> None:
    """For all its tests in a folder or a file."""
    chosen = [item.nodeid for item in session.items if item.path.is_relative_to(where) and _interpreted(item)]
    if chosen and INSTALLED and not INTERPRETING:
        _interpreters.update(dict.fromkeys(chosen, Interpreter(session.config, chosen)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not INTERPRETING or REPORT not in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "text": text}) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETING or not _interpreted(pyfuncitem):
        return None
    if pyfuncitem.nodeid not in _interpreters:
        _start_interpreter(pyfuncitem.session, pyfuncitem.path)
    interpreter = _interpreters[pyfuncitem.nodeid]
    outcome = interpreter.outcomes().get(pyfuncitem.nodeid)
    if outcome is None:
        output = interpreter.output()
        pytest.fail(f"the interpreter's process ended before this test:\n{output[-4000:]}", pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def _patch_language_once_a_launch() -> None:
    """The interpreter patches triton.language anew with every call of a function, which takes half its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        seen = {name for name, module in (("tl", tl), ("core", tl.core)) if module in _modules(function)}
        if seen <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(function)

    def launch_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the last launch undid it
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched


@cache
def _modules(function: Any) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if isinstance(value, ModuleType)]


def pytest_unconfigure(config: pytest.Config) -> None:
    for interpreter in set(_interpreters.values()):
        interpreter.close()


def _interpreted(item: pytest.Item) -> bool:
    return item.get_closest_marker("interpreter") is not None
