"""What docs/trl.md shows works as it stands there."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's, of which TRL has several


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="docs/trl.md runs where trl is installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "trl.md", "exec"), names)
    first, again = names["reward"].history[:4], names["reward"].history[4:]
    assert [row["step"] for row in first] == [1, 2, 3, 4]
    assert [row["step"] for row in again] == [3, 4]
    assert all(math.isfinite(value) for row in first for value in row.values())
    (logged,) = [row for row in names["trainer"].state.log_history if "reward" in row]
    assert math.isfinite(logged["rewards/irlfast_reward/mean"])
