"""The picture and the table of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irlfast.report import plot_curves, print_comparison, write_json
from irlfast.train.log import RunLog


def test_plot_draws_what_the_log_holds(tmp_path: Path) -> None:
    with RunLog(tmp_path / "metrics.jsonl") as log:
        for iteration in range(3):
            metrics = {"reward_auc": 0.9 - 0.1 * iteration, "length": 12.99, "expert_length": 13.0, "kl": float("nan")}
            log.write("eval", iteration, metrics)
    picture = tmp_path / "curves.png"
    plot_curves(tmp_path / "metrics.jsonl", picture, levels={"reward_auc": {"rival": 0.7}})
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_table_has_a_row_for_each_metric_and_a_dash_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison({"start": {"kl": 0.0, "seconds": 3.0}, "after": {"kl": 1.25, "steps": 7}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["start", "after"], ["kl", "0.0000", "1.2500"], ["steps", "-", "7"]]


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
