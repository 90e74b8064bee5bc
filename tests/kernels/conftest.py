"""Three ways to run a Triton kernel: in Triton's interpreter, compiled for a GPU that is not there, and on one that is.

A test marked `interpreter` runs in a second pytest, as Triton decides on import whether to interpret; its outcome is
shown here as if it had run here. All of them share that one process, which runs beside the other tests. The fixture
`device` gives a test both ways: "cpu" in the interpreter and "cuda" on a GPU, where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The helpers beside this file: triton_compile, triton_cases and so on.
sys.path.append(str(Path(__file__).parent))

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REPORT = "IRLFAST_INTERPRETER_REPORT"
INSTALLED = importlib.util.find_spec("triton") is not None

_child: subprocess.Popen[str] | None = None
_report: Path | None = None
_outcomes: dict[str, dict[str, str]] | None = None


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cpu" or "cuda". The interpreter is slow: there every kernel gets blocks of 16 lanes, which small rows cross."""
    if request.param == "cuda":
        yield "cuda"
        return
    from irlfast.kernels import _tuning
    from irlfast.ops._triton import block_for

    monkeypatch.setattr(_tuning, "config", lambda kernel, target, bytes_, vocab: _tuning.Config(16 * 16 // bytes_, 4))
    block_for.cache_clear()
    yield "cpu"
    block_for.cache_clear()


def pytest_configure(config: pytest.Config) -> None:
    # What the interpreter computes on purpose, such as inf - inf, numpy warns of.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy")


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
    global _child, _report
    chosen = [item.nodeid for item in session.items if item.path.is_relative_to(HERE) and _interpreted(item)]
    if INTERPRETING or not INSTALLED or not chosen or session.config.option.collectonly:
        return
    folder = Path(tempfile.mkdtemp(prefix="irlfast-interpreter-"))
    _report = folder / "report"
    environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(_report)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", session.config.rootpath]
    with (folder / "output").open("w") as output:
        _child = subprocess.Popen(
            [str(part) for part in (*command, *chosen)],
            cwd=session.config.rootpath,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


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
    outcome = _collect_outcomes().get(pyfuncitem.nodeid)
    if outcome is None:
        assert _report is not None
        output = (_report.parent / "output").read_text()
        pytest.fail(f"the interpreter's process ended before this test:\n{output[-4000:]}", pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _child is not None and _child.poll() is None:
        _child.kill()


def _interpreted(item: pytest.Item) -> bool:
    return item.get_closest_marker("interpreter") is not None


def _collect_outcomes() -> dict[str, dict[str, str]]:
    """By the tests' names; waits for the interpreter's process."""
    global _outcomes
    if _outcomes is None:
        assert _child is not None
        assert _report is not None
        _child.wait()
        lines = _report.read_text().splitlines() if _report.exists() else []
        reports: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # A failure in the set-up or the tear-down of a test counts as one of the test.
        reports.sort(key=lambda report: report["outcome"] == "failed")
        _outcomes = {report["test"]: report for report in reports}
    return _outcomes
