"""RunLog: one JSON object a line, flushed, cut back on resume, never overwritten. Progress: a bar on a terminal."""

import json
import math
from pathlib import Path

import pytest
import torch

from irlfast.train.log import Progress, RunLog, read_log


def filled(path: Path, iterations: int) -> None:
    with RunLog(path) as log:
        for i in range(1, iterations + 1):
            log.write("train", i, {"loss": i / 10})
            if i % 2 == 0:
                log.write("eval", i, {"auc": 0.5})


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with RunLog(path) as log:
        returned = log.write("train", 3, {"loss": torch.tensor(0.5), "steps": 7, "note": "x"})
        assert read_log(path) == [returned]
        assert path.read_text().endswith("}\n")
    assert {k: v for k, v in returned.items() if k != "seconds"} == {
        "kind": "train",
        "iteration": 3,
        "loss": 0.5,
        "steps": 7,
        "note": "x",
    }
    assert returned["seconds"] >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, value: object) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        log.write("train", 1, {"loss": value})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] is None


def test_a_log_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 2)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is there already: choose another --out, or --resume this run"):
        RunLog(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("resume_from", "rows"), [(0, 0), (3, 4), (4, 6), (9, 7)])
def test_resume_drops_rows_of_later_iterations_and_appends(tmp_path: Path, resume_from: int, rows: int) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 5)
    before = path.read_text().splitlines()
    with RunLog(path, resume_from=resume_from) as log:
        assert path.read_text().splitlines() == before[:rows]
        log.write("train", resume_from + 1, {"loss": 0.0})
    after = path.read_text().splitlines()
    assert after[:-1] == before[:rows]
    assert json.loads(after[-1])["iteration"] == resume_from + 1
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_from", [None, 5])
def test_a_half_written_last_line_is_left_out(tmp_path: Path, resume_from: int | None) -> None:
    path = tmp_path / "metrics.jsonl"
    filled(path, 5)
    whole = read_log(path)
    with path.open("a") as file:
        file.write('{"kind": "train", "iteration": 6, "lo')
    assert read_log(path) == whole
    if resume_from is not None:
        with RunLog(path, resume_from=resume_from) as log:
            log.write("train", 6, {"loss": 1.0})
        assert [row["iteration"] for row in read_log(path)] == [1, 2, 2, 3, 4, 4, 5, 6]


def test_resume_without_a_log_begins_one(tmp_path: Path) -> None:
    with RunLog(tmp_path / "metrics.jsonl", resume_from=3) as log:
        log.write("train", 4, {})
    assert len(read_log(tmp_path / "metrics.jsonl")) == 1


def test_rows_of_one_kind(tmp_path: Path) -> None:
    filled(tmp_path / "metrics.jsonl", 5)
    assert [row["iteration"] for row in read_log(tmp_path / "metrics.jsonl", "eval")] == [2, 4]


def test_progress_off_a_terminal_is_one_line_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "bilevel") as progress:
        progress.advance_to(5, {"auc": 0.5})
        progress.note("iteration 5", {"auc": 0.123456, "rows": 3})
    captured = capsys.readouterr()
    assert captured.err == "bilevel: iteration 5: auc 0.1235, rows 3\n"
    assert captured.out == ""


def test_progress_on_a_terminal_draws_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(10, "bilevel") as progress:
        progress.advance_to(10, {"auc": 0.25})
        progress.note("iteration 10", {"auc": 0.5})
    captured = capsys.readouterr()
    assert "bilevel: iteration 10: auc 0.5" in captured.err
    assert "10/10" in captured.err
    assert captured.out == ""
