"""docs/trl.md says what docs/results/trl_online.json holds."""

from __future__ import annotations

import json
from pathlib import Path

from bench.experiments import trl_online

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"


def test_the_table_of_the_page_is_the_files() -> None:
    runs = json.loads(trl_online.RESULT.read_text(encoding="utf-8"))["runs"]
    assert {run["reward"] for run in runs} == {"learned online", "random, frozen"}
    assert trl_online.table(runs) in PAGE.read_text(encoding="utf-8")
