"""`irlfast demo`, whole, at sizes that take seconds; the figures of the real sizes are in docs/results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from irlfast.cli import main
from irlfast.demo import experiment, toy


def test_demo_writes_everything_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(experiment.bilevel_config(0), iterations=2, reward_warmup_steps=1, prompts_per_step=4, eval_every=1)
    monkeypatch.setattr(experiment, "bilevel_config", lambda seed: replace(small, seed=seed))
    monkeypatch.setattr(experiment, "PRETRAINING", replace(experiment.PRETRAINING, steps=5))
    monkeypatch.setattr(experiment, "FINE_TUNING", replace(experiment.FINE_TUNING, steps=2))
    monkeypatch.setattr(experiment, "PRETRAINING_ROWS", 400)
    short = replace(toy.toy_config(), iterations=3)
    monkeypatch.setattr(toy, "toy_config", lambda seed: replace(short, seed=seed))

    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seed", "3"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    for name in (
        "seconds",
        "policy_accuracy_before",
        "policy_accuracy_after",
        "sft_accuracy",
        "reward_pair_accuracy",
        "toy_pearson",
        "toy_tv",
    ):
        assert isinstance(summary[name], float), name
    assert summary["seed"] == 3
    assert summary["seconds"] > 0
    assert (out / "metrics.jsonl").stat().st_size > 0
    assert "held-out accuracy" in (out / "report.html").read_text()
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "checkpoints" / "latest").read_text() == "step-2\n"
    assert "bi-level inverse RL" in capsys.readouterr().out

    assert main(["demo", "--out", str(out)]) == 1
    assert "holds an earlier run" in capsys.readouterr().err


def test_the_parts_of_the_data_share_no_prompt() -> None:
    data = experiment.make_data(0)
    prompts = [
        {row.prompt_ids for row in part} for part in (data.text, data.demonstrations, data.validation, data.heldout)
    ]
    assert [len(p) for p in prompts[1:]] == [experiment.DEMONSTRATIONS, experiment.VALIDATION, experiment.HELDOUT]
    for i, part in enumerate(prompts):
        for other in prompts[i + 1 :]:
            assert not part & other
