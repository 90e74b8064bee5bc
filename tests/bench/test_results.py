"""Results files merge, and what is no results file is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import _results


def part(run: str, date: str, *rows: dict[str, Any]) -> dict[str, Any]:
    about = {"op": "x", "line": "A", "work": "w", "dtype": "float32", "malloc": "tuned", "threads": 2}
    return {"runs": {run: {"date": date}}, "rows": [{**about, "date": date, "run": run, **row} for row in rows]}


def test_the_newer_measurement_of_a_case_counts() -> None:
    old = part("a", "2026-01-01", {"shape": [1], "pass": "f"}, {"shape": [1], "pass": "b"}, {"shape": [2], "pass": "f"})
    new = part("b", "2026-01-02", {"shape": [1], "pass": "f"})
    for order in ([old, new], [new, old]):
        merged = _results.merge(order)
        assert sorted((row["shape"], row["pass"], row["run"]) for row in merged["rows"]) == [
            ([1], "f", "b"),  # with it went the other pass of the old case
            ([2], "f", "a"),
        ]
        assert set(merged["runs"]) == {"a", "b"}


def test_a_run_without_rows_left_is_dropped() -> None:
    old, new = part("a", "2026-01-01", {"shape": [1]}), part("b", "2026-01-02", {"shape": [1]})
    assert set(_results.merge([old, new])["runs"]) == {"b"}


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    results = _results.merge([part("a", "2026-01-01", {"shape": [1]})])
    file = tmp_path / "folder" / "results.json"
    _results.write(file, results)
    assert _results.read(file) == results
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", [[], {"format": 2, "runs": {}, "rows": []}, {"format": 1, "rows": []}])
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no results file"):
        _results.read(file)


def test_provenance_names_machine_load_and_versions() -> None:
    origin = _results.provenance("python -m bench all")
    assert {
        "command",
        "date",
        "machine",
        "cores",
        "load_average",
        "torch",
        "irlfast",
        "compiler",
        "isa",
        "peers",
    } <= set(origin)
    assert origin["machine"]
