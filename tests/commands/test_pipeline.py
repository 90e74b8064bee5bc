"""tune, pairs, extract and pipeline on a real small model: what they write, and that a killed chain goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("transformers")

from irlfast.cli import main
from irlfast.commands import pipeline
from irlfast.commands.pipeline import reward_at_kl

TRUE = "irlfast.eval.text_rewards.positive_sentences"


def _arguments(shared_data: Path, out: Path) -> list[str]:
    return [
        "pipeline",
        *("--model", str(shared_data / "models" / "stories260K")),
        *("--prompts", str(shared_data / "text" / "tinystories_1000.jsonl.gz")),
        *("--true-reward", TRUE, "--out", str(out), "--prompt-tokens", "8", "--heldout", "8"),
        *("--tune.iterations", "2", "--tune.eval-every", "1", "--tune.prompts-per-step", "4"),
        *("--tune.rollout.max-new-tokens", "16", "--tune.rollout.n", "2", "--tune.eval-prompts", "8"),
        *("--sampling.max-new-tokens", "16", "--max-prompts", "40", "--extract.epochs", "2", "--seeds", "2"),
        *("--device", "cpu", "--rival"),
    ]


def test_a_chain_that_is_stopped_goes_on_at_its_step_and_ends_alike(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(_arguments(shared_data, whole)) == 0

    def die(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "run_extract", die)
        assert main(_arguments(shared_data, cut)) == 130
    assert not (cut / "extracted" / "report.json").exists()
    capsys.readouterr()
    assert main(_arguments(shared_data, cut)) == 0
    said = capsys.readouterr().out
    assert "[2/4] sample both models (done before)" in said
    assert "[3/4] extract the reward\n" in said
    assert (cut / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    assert json.dumps(summaries[0]) == json.dumps(summaries[1])

    assert summaries[0]["start"]["kl"] == 0
    assert summaries[0]["tuned"]["iteration"] == summaries[0]["retuned"]["iteration"] == 2
    # An extracted reward is in nats, the true one in units of its own: each tuning has the KL weight of its reward.
    states = [json.loads((whole / run / "checkpoints/step-2/state.json").read_text()) for run in ("tuned", "retuned")]
    assert [state["config"]["beta"] for state in states] == [0.1, 1.0]
    report = json.loads((whole / "extracted" / "report.json").read_text())
    assert {"accuracy", "spearman", "truth_accuracy", "length_spearman"} <= report["test"].keys()
    assert {"accuracy", "auc"} <= report["tfidf"].keys()
    assert len(report["seeds"]) == 2
    assert -1 <= report["identifiability"]["spearman_min"] <= 1
    assert (whole / "extracted" / "extraction.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (whole / "extracted" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == report["test"]["pairs"]

    # Another configuration in the same folder, and a folder that is taken, are refused.
    other = [argument if argument != "40" else "41" for argument in _arguments(shared_data, whole)]
    assert main(other) == 1
    assert "was begun with another max_prompts" in capsys.readouterr().err
    single = ["--pairs", str(whole / "pairs.jsonl"), "--out", str(whole / "extracted")]
    assert main(["extract", "--model", str(shared_data / "models" / "stories260K"), *single]) == 1
    assert "holds an earlier run" in capsys.readouterr().err


def test_reward_at_a_kl_is_read_between_evaluations() -> None:
    rows = [{"kl": 0.0, "true_reward": 1.0}, {"kl": 2.0, "true_reward": 3.0}, {"kl": 1.5, "true_reward": 9.0}]
    assert reward_at_kl(rows, 0.5) == pytest.approx(1.5)
    assert reward_at_kl(rows, 2.0) == pytest.approx(3.0)
    assert reward_at_kl(rows, 5.0) == 9.0
    assert math.isfinite(reward_at_kl(rows[:1], 0.0))
