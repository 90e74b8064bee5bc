"""The table of objectives and policy updates: made of committed rows, and the same in docs/results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import _objectives

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "objectives_demo.jsonl"


def row(seed: int, objective: str, update: str, accuracy: float) -> dict[str, object]:
    return {
        "seed": seed,
        "objective": objective,
        "update": update,
        "accuracy": accuracy,
        "reward_auc": 0.5,
        "kl": 2.0,
    }


def test_table_has_mean_and_range_of_each_combination() -> None:
    rows = [row(0, "gail", "grpo", 0.25), row(1, "gail", "grpo", 0.75), row(0, "maxent", "reinforce", 0.5)]
    lines = _objectives.table(rows)
    assert lines[2:] == [
        "| maxent | reinforce | 1 | 0.500 (0.500 to 0.500) | 0.500 (0.500 to 0.500) | 2.00 (2.00 to 2.00) |",
        "| gail | grpo | 2 | 0.500 (0.250 to 0.750) | 0.500 (0.500 to 0.500) | 2.00 (2.00 to 2.00) |",
    ]


def test_every_combination_has_a_configuration() -> None:
    for objective in _objectives.OBJECTIVES:
        for update in _objectives.UPDATES:
            config = _objectives.configuration(3, objective, update, 7)
            assert config.seed == 3
            assert config.iterations == 7
            assert config.reward.objective == objective
            assert config.beta == _objectives.BETA[objective]


def test_the_page_shows_the_committed_rows() -> None:
    rows = _objectives.read(RESULTS)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "\n".join(_objectives.table(rows)) in page
    combinations = {(r["objective"], r["update"]) for r in rows}
    assert len(combinations) == len(_objectives.OBJECTIVES) * len(_objectives.UPDATES)
    assert len({(r["seed"], r["objective"], r["update"]) for r in rows}) == len(rows)
