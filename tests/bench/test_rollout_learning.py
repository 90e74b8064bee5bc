"""Runs of further seeds join those that a file holds, and only runs of the same length do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("transformers")
pytest.importorskip("aiohttp")

from bench.rollout.__main__ import Learning, _other_seeds
from irlfast.rollout import SGLangOptions


def test_runs_of_other_seeds_stay(tmp_path: Path) -> None:
    path = tmp_path / "learning.json"
    options = Learning(model="", demonstrations="", sglang=SGLangOptions(), json=path, iterations=3, seeds=(1, 2))
    assert _other_seeds(options) == []
    path.write_text(json.dumps({"iterations": 3, "rows": [{"seed": 0}, {"seed": 1}]}))
    assert _other_seeds(options) == [{"seed": 0}]
    path.write_text(json.dumps({"iterations": 4, "rows": [{"seed": 0}]}))
    with pytest.raises(ValueError, match="runs of 4 iterations, not 3"):
        _other_seeds(options)
