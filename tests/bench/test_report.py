"""Tables and the picture from made-up rows; the tables in the docs from the committed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import _results, table
from bench._case import OURS, Bar, judge
from bench._report import headline, markdown, summary

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/performance.md")


def row(line: str, ratio: float, bar: Bar, **changes: Any) -> dict[str, Any]:
    blank = {"rounds": 3, "gb_per_s": 1.0, "gflop_per_s": None, "peak_mib": 5.0, "extra_mib": 4.0, "error": {"x": 1e-7}}
    contenders = {
        OURS: {**blank, "family": "ours", "median_ms": 2.0, "ratio": 1.0},
        "compiled": {**blank, "family": "compile", "median_ms": 2.0 * ratio, "ratio": ratio},
        "product": {**blank, "family": "ceiling", "median_ms": 1.9, "ratio": 0.95, "error": {}},
    }
    return {
        "line": line, "op": "x", "work": "w", "shape": [4, 8], "dtype": "float32", "pass": "forward", "malloc": "tuned",
        "threads": 2, "subject": OURS, "date": "2026-01-01", "run": "r", "contenders": contenders, "skipped": {},
        "verdicts": [judge(bar, OURS, contenders)], **changes,
    }  # fmt: skip


SPEEDUP = Bar(kind="speedup", against="compile", limit=3)
OVERRUN = Bar(kind="overrun", against={"product": 1}, limit=1.1)
ROWS = [
    row("A", 4.25, SPEEDUP),
    row("A", 2.5, SPEEDUP, shape=[2, 9]),
    row("A", 2.75, SPEEDUP, malloc="default"),
    row("D", 1.2, OVERRUN),
]
RUN = {"command": "c", "date": "2026-01-01", "machine": "m", "cores": 2, "isa": "i", "load_average": None, "torch": "t"}
RESULTS = {"format": 1, "runs": {"r": RUN}, "rows": ROWS}


def test_the_summary_counts_and_shows_the_worst() -> None:
    first, second = summary(ROWS)
    assert (first["line"], first["asked"], first["met"]) == ("A", 3, 1)
    assert first["worst"][1]["value"] == 2.5
    assert (second["line"], second["asked"], second["met"]) == ("D", 1, 1)


def test_tables_have_the_figures_and_settings_side_by_side() -> None:
    text = markdown(RESULTS)
    assert "| A | at least 3 x faster than the best torch.compile | 1 of 3 | 2.50 (2x9, float32, forward, tuned" in text
    assert (
        "| w | 4x8 | float32 | forward |  | 2 | 2.00 |  | 4.25 |  |  | 2.00 |  | 2.75 |  |  | 5 | x 1.0e-07 |" in text
    )
    assert "| 1.20 |  | 1.05 |" in text  # line D: time over that of the product
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    _results.write(file, RESULTS)
    assert table.main([str(file), "--plot", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench._plot import draw

    with pytest.raises(ValueError, match="nothing to draw"):
        draw(_results.empty(), str(tmp_path / "picture.png"))


def test_parts_are_merged_into_one_file(tmp_path: Path) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    _results.write(parts[0], {**RESULTS, "rows": ROWS[:2]})
    _results.write(parts[1], {**RESULTS, "rows": ROWS[2:]})
    assert table.main([*map(str, parts), "--json", str(tmp_path / "whole.json")]) == 0
    assert _results.read(tmp_path / "whole.json") == RESULTS


def test_a_page_is_filled_from_the_file_it_names(tmp_path: Path) -> None:
    _results.write(tmp_path / "results.json", RESULTS)
    page = "before\n<!-- figures: results.json -->\nold\n<!-- end of figures -->\nafter\n"
    filled = table.fill(page, tmp_path)
    assert filled == (
        f"before\n<!-- figures: results.json -->\n\n{markdown(RESULTS)}\n\n<!-- end of figures -->\nafter\n"
    )
    assert table.fill(filled, tmp_path) == filled


def test_the_headline_has_the_first_shape_of_each_line() -> None:
    assert headline(RESULTS).splitlines()[2:] == [
        "| w | 4x8 | forward | 2.00 |  | 4.2 |",
        "| w | 4x8 | forward | 2.00 |  | 1.2 |",
    ]


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_in_the_docs_are_those_of_the_committed_files(name: str) -> None:
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("a source distribution has no results")
    page = (ROOT / name).read_text(encoding="utf-8")
    assert table.BLOCK.search(page), f"{name} has no tables"
    assert page == table.fill(page, ROOT), f"run: python -m bench table --page {name}"
