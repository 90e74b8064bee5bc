"""The command: which cases it chooses, that it measures in processes of their own, and what it leaves behind."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _results, _run
from bench.__main__ import main
from bench._case import Case

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


CASES = [
    Case(op=op, line=line, work="w", shape=shape, dtype=dtype)
    for op, line in (("x", "A"), ("y", "D"))
    for shape in ((8, 64), (16, 32))
    for dtype in ("float32", "bfloat16")
]


def chosen(*argv: str) -> list[Case]:
    return _run.choose(CASES, _run.parser("all").parse_args(argv))


def test_every_case_is_chosen_by_default() -> None:
    assert chosen() == CASES


def test_options_choose_cases() -> None:
    assert {case.line for case in chosen("--lines", "D")} == {"D"}
    assert {case.dtype for case in chosen("--dtypes", "bfloat16")} == {"bfloat16"}
    assert [case.shape for case in chosen("--lines", "A", "--dtypes", "float32", "--scale", "0.25")] == [
        (2, 64),
        (4, 32),
    ]
    quick = chosen("--quick")
    assert {case.shape for case in quick} == {(8, 64)}
    assert {case.mallocs for case in quick} == {("tuned",)}
    assert {case.mallocs for case in chosen("--malloc", "default")} == {("default",)}
    assert [case.shape for case in chosen("--shape", "3x5", "--lines", "A")] == [(3, 5), (3, 5)]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--lines", "Z"], "no case has line Z; there are A, D"),
        (["--dtypes", "float16"], "no case to measure"),
        (["--shape", "3x5x7"], "--shape has 3 numbers"),
        (["--scale", "0"], "positive"),
    ],
)
def test_options_that_leave_nothing_are_refused(argv: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        chosen(*argv)


def test_a_shape_that_is_none_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="positive integers"):
        _run.shape_of("12xa")


def test_lots_are_of_one_op_line_and_shape_and_leave_out_what_is_done() -> None:
    everything = _run.lots(CASES, (), threads=2)
    assert [(malloc, len(cases)) for malloc, cases in everything] == [("tuned", 2), ("default", 2)] * 4
    row = {"op": "x", "line": "A", "work": "w", "shape": [8, 64], "dtype": "float32", "malloc": "tuned", "threads": 2}
    assert [len(cases) for _, cases in _run.lots(CASES, [_results.case_key(row)], threads=2)] == [1, *[2] * 7]
    assert _run.lots(CASES, [_results.case_key(row)], threads=1) == everything


def test_it_measures_and_keeps_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "results.json", tmp_path / "results.png"
    options = ["token_stats", "--lines", "A", "--dtypes", "float32", "--shape", "8x64", "--budget", "0.01",
               "--threads", "1", "--skip", "compile,peer", "--no-tests", "--json", str(file)]  # fmt: skip
    assert main([*options, "--plot", str(picture)]) == 0
    assert "line     met" in capsys.readouterr().out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = _results.read(file)
    assert {row["malloc"] for row in results["rows"]} == {"tuned", "default"}
    for row in results["rows"]:
        assert {"line", "op", "work", "shape", "dtype", "pass", "malloc", "threads", "subject", "date", "run"} <= set(
            row
        )
        assert row["run"] in results["runs"]
        assert all(figures["ratio"] > 0 for figures in row["contenders"].values())
        measured = row["contenders"][row["subject"]]["peak_mib"] is not None
        assert measured == (row["malloc"] == "default" and sys.platform == "linux")

    # A run that was cut off after its first lot goes on with the second alone.
    cut = {**results, "rows": [row for row in results["rows"] if row["malloc"] == "tuned"]}
    _results.write(file, cut)
    assert main([*options, "--missing"]) == 0
    assert {row["malloc"] for row in _results.read(file)["rows"]} == {"tuned", "default"}
    assert [row for row in _results.read(file)["rows"] if row["malloc"] == "tuned"] == cut["rows"]


def test_what_could_not_be_measured_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(lot: _run.Lot, *args: Any) -> bool:
        return False

    monkeypatch.setattr(_run, "run_lot", fail)
    assert _run.main("token_stats", ["--quick", "--lines", "A", "--no-tests"]) == 1
    assert "not measured, see above: A: log-prob, 1024x50304, float32" in capsys.readouterr().err


def test_an_op_whose_tests_fail_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "tests_pass", lambda op: False)
    monkeypatch.setattr(_run, "run_lot", lambda *args: pytest.fail("measured all the same"))
    assert _run.main("token_stats", ["--quick"]) == 1


@pytest.mark.parametrize("arguments", [["all", "--help"], ["token_stats", "--help"], ["table", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert f"usage: python -m bench {arguments[0]}" in capsys.readouterr().out


def test_the_command_alone_names_what_there_is() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert {"all", "table", "token_stats"} <= set(re.findall(r"\w+", done.stdout))


@pytest.mark.parametrize(
    "arguments", [["all", "--missing"], ["all", "--lines", "Z"], ["all", "--shape", "x"], ["table"]]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m bench" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["no_such_op"]])
def test_an_unknown_target_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: python -m bench" in capsys.readouterr().err
