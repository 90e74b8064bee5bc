"""`irlfast bilevel` with each kind of reward model, whole: trained, evaluated, saved, resumed, scored, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from irlfast.cli import main
from irlfast.commands.bilevel import BiLevelCommand, run_bilevel
from irlfast.commands.reward_options import RewardModelOptions
from irlfast.commands.rows import DataConfig
from irlfast.rewards import load_reward_model
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig

# peft asks transformers for an attribute by the name that it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "trajectory": {"width": 16, "heads": 2, "layers": 1, "dropout": 0.1},
    "multi": {"parts": ("mean", "trajectory"), "part_weights": (1.0, 0.5), "hidden_sizes": (8,)},
    "ensemble": {"members": 3, "penalty": 0.5, "hidden_sizes": (8,)},
    "backbone": {"tuning": "lora", "lora_rank": 2, "hidden_sizes": (), "pooling": ("last",), "output_bound": None},
}


@pytest.fixture
def command(shared_data: Path) -> Callable[[Path, str], BiLevelCommand]:
    def make(out: Path, kind: str) -> BiLevelCommand:
        return BiLevelCommand(
            model=str(shared_data / "models" / "stories260K"),
            demonstrations=str(shared_data / "text" / "tinystories_1000.jsonl.gz"),
            out=out,
            supervised_baseline=False,
            data=DataConfig(limit=30, heldout=6),
            reward_model=RewardModelOptions(type=kind, **KINDS[kind]),  # type: ignore[arg-type]
            train=BiLevelConfig(
                iterations=2,
                prompts_per_step=3,
                eval_every=1,
                eval_prompts=6,
                checkpoint_every=1,
                rollout=SamplingParams(max_new_tokens=8, n=2),
                policy=PolicyConfig(optimizer=OptimizerConfig(lr=1e-3)),
                reward=RewardConfig(optimizer=OptimizerConfig(lr=1e-2)),
            ),
        )

    return make


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_each_kind(
    command: Callable[[Path, str], BiLevelCommand],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_bilevel(command(whole, kind)) == 0
    reward = load_reward_model(whole / "checkpoints" / "step-2" / "reward")
    assert reward.model_type == kind
    assert float(reward.normalizer.count) == 2 * 3 * 2
    (last,) = [row for row in rows(whole / "metrics.jsonl") if row["kind"] == "eval" and row["iteration"] == 2]
    if kind == "multi":
        assert {"mean_expert", "mean_sample", "trajectory_expert", "trajectory_sample"} <= last.keys()
    if kind == "ensemble":
        assert last["disagreement_sample"] > 0
    record = rows(whole / "samples.jsonl")[-1]
    assert all(("token_rewards" in row) == (kind != "ensemble") for row in record["rows"])  # with a penalty: none
    assert "Best and worst responses" in (whole / "report.html").read_text()

    step = BiLevelTrainer._iterate

    def stop_in_the_second(self: BiLevelTrainer) -> dict[str, float]:
        if self.iteration == 1:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(BiLevelTrainer, "_iterate", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_bilevel(command(cut, kind))
    run_bilevel(replace(command(cut, kind), resume=True))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(cut / name) == rows(whole / name)

    capsys.readouterr()
    file = tmp_path / "new.jsonl"
    worst = record["rows"][-1]
    file.write_text(
        json.dumps({"prompt": worst["prompt"].removeprefix("<s>").strip(), "response": " was here."}) + "\n"
    )
    assert main(["score", "--reward", str(whole), "--input", str(file)]) == 0
    (scored,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert scored["normalised"] == pytest.approx(
        (scored["reward"] - float(reward.normalizer.mean)) / reward.normalizer.scale, abs=1e-4
    )
    assert len(scored["tokens"]) <= 8
