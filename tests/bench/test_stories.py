"""The runs on real stories: their configurations, what a run leaves, and their table in docs/results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import _objectives, _stories

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "objectives_stories.jsonl"


def test_every_combination_has_a_configuration() -> None:
    for objective in _objectives.OBJECTIVES:
        for update in _objectives.UPDATES:
            config = _stories.configuration(4, objective, update, 6)
            assert (config.seed, config.iterations, config.eval_every) == (4, 6, 6)
            assert config.reward.objective == objective
            assert config.beta == _objectives.BETA[objective]
            assert config.policy.kind == _objectives.UPDATES[update]["kind"]


def test_a_run_starts_from_the_model_and_leaves_a_row(shared_data: Path) -> None:
    """Two in a row: the first run's policy is not where the second begins."""
    start = _stories.Start(shared_data, 0)
    rows = [_stories.run(start, 0, objective, "grpo", 1) for objective in ("maxent", "gail")]
    assert rows[0]["logprob_start"] == rows[1]["logprob_start"]
    assert all(0.0 <= row["reward_auc"] <= 1.0 and row["kl"] != 0.0 for row in rows)
    unseen = {row.prompt_ids for row in start.heldout}
    assert not any(row.prompt_ids in unseen for row in start.demonstrations)
    assert len(_objectives.table(rows, _stories.COLUMNS)) == 4


def test_the_page_shows_the_committed_rows() -> None:
    rows = _objectives.read(RESULTS)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "\n".join(_objectives.table(rows, _stories.COLUMNS)) in page
    combinations = {(row["objective"], row["update"]) for row in rows}
    assert len(combinations) == len(_objectives.OBJECTIVES) * len(_objectives.UPDATES)
    assert len({(row["seed"], row["objective"], row["update"]) for row in rows}) == len(rows)
