"""`irlfast bilevel` on a real language model and real stories, at sizes that take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from irlfast.cli import main
from irlfast.commands.bilevel import BiLevelCommand, run_bilevel
from irlfast.commands.rows import DataConfig
from irlfast.rewards import RewardModel
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig, SupervisedConfig
from irlfast.train.config import EarlyStopConfig, LoraConfig
from irlfast.train.log import read_log


@pytest.fixture
def stories(shared_data: Path) -> Callable[[Path], BiLevelCommand]:
    def command(out: Path) -> BiLevelCommand:
        return BiLevelCommand(
            model=str(shared_data / "models" / "stories260K"),
            demonstrations=str(shared_data / "text" / "tinystories_1000.jsonl.gz"),
            out=out,
            data=DataConfig(limit=60, heldout=12),
            supervised=SupervisedConfig(steps=2, batch_size=4, eval_every=1),
            train=BiLevelConfig(
                iterations=4,
                reward_warmup_steps=1,
                prompts_per_step=4,
                eval_every=2,
                eval_prompts=12,
                checkpoint_every=2,
                rollout=SamplingParams(max_new_tokens=12, n=2),
                policy=PolicyConfig(kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=1e-3)),
                reward=RewardConfig(optimizer=OptimizerConfig(lr=1e-2)),
            ),
        )

    return command


def rows_without_time(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(path)]


def test_a_run_leaves_its_figures_its_picture_and_models_that_load(
    stories: Callable[[Path], BiLevelCommand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run_bilevel(stories(tmp_path / "run")) == 0
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"start", "bi-level IRL", "supervised"}
    for column in summary.values():
        assert 0.0 <= column["reward_auc"] <= 1.0
        assert -3.0 < column["expert_token_logprob"] < -0.5  # nats; the model's own figure on these stories is -1.5
        assert column["expert_length"] <= 12
    assert summary["start"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert summary["bi-level IRL"]["kl"] != 0.0
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "reward_auc" in capsys.readouterr().out

    latest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    assert latest.name == "step-4"
    model = AutoModelForCausalLM.from_pretrained(latest / "policy")
    tokenizer = AutoTokenizer.from_pretrained(latest / "policy")
    start = AutoModelForCausalLM.from_pretrained(stories(out).model)
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    # It was trained, and what was trained is what was saved.
    assert not torch.equal(model(input_ids=ids).logits, start(input_ids=ids).logits)
    reward = RewardModel.from_pretrained(latest / "reward")
    assert float(reward.normalizer.count) == 4 * 4 * 2  # rewards served: iterations x prompts x samples


def test_resume_ends_as_an_uninterrupted_run(
    stories: Callable[[Path], BiLevelCommand], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irlfast.train import BiLevelTrainer

    whole, cut = stories(tmp_path / "whole"), stories(tmp_path / "cut")
    run_bilevel(replace(whole, supervised_baseline=False))

    step = BiLevelTrainer._iterate

    def stop_in_the_fourth(self: BiLevelTrainer) -> dict[str, float]:
        if self.iteration == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(BiLevelTrainer, "_iterate", stop_in_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run_bilevel(replace(cut, supervised_baseline=False))
    run_bilevel(replace(cut, supervised_baseline=False, resume=True))
    assert rows_without_time(cut.out / "metrics.jsonl") == rows_without_time(whole.out / "metrics.jsonl")


def test_adapters_a_critic_and_an_early_stop(stories: Callable[[Path], BiLevelCommand], tmp_path: Path) -> None:
    """Everything that is off by default, together: the summary is of where the run stopped."""
    command = stories(tmp_path / "run")
    policy = PolicyConfig(kind="ppo", advantage="gae", lora=LoraConfig(rank=2), optimizer=OptimizerConfig(lr=1e-2))
    stop = EarlyStopConfig(patience=1, band=0.499)
    run_bilevel(replace(command, train=replace(command.train, policy=policy, early_stop=stop)))
    out = tmp_path / "run"
    assert [row["iteration"] for row in read_log(out / "metrics.jsonl", "eval")] == [0, 2]
    assert [row["iteration"] for row in read_log(out / "metrics.jsonl", "stop")] == [2]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bi-level IRL"]["kl"] != 0.0
    assert summary["start"]["kl"] == pytest.approx(0.0, abs=1e-5)
    saved = out / "checkpoints" / "step-2"
    assert (saved / "policy" / "adapter_model.safetensors").stat().st_size < 300_000  # the model has a megabyte
    assert (saved / "critic" / "model.safetensors").is_file()


def test_a_second_run_into_the_same_folder_is_refused(
    stories: Callable[[Path], BiLevelCommand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = stories(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    source = ["--model", command.model, "--demonstrations", command.demonstrations]
    assert main(["bilevel", *source, "--out", str(tmp_path)]) == 1
    assert "holds an earlier run" in capsys.readouterr().err


def test_nothing_evaluated_is_trained_on(stories: Callable[[Path], BiLevelCommand], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from irlfast.commands.rows import read_rows

    command = replace(stories(tmp_path), data=DataConfig(heldout=200, prompt_tokens=8))
    training, validation, heldout = read_rows(
        command.demonstrations,
        command.data,
        AutoTokenizer.from_pretrained(command.model),
        max_response_tokens=64,
        seed=0,
    )
    # At 8 tokens many stories begin alike ("Once upon a time ..."), so the rows alone would not keep prompts apart.
    assert len(training) + len(validation) < 800
    assert not {r.prompt_ids for r in heldout} & {r.prompt_ids for r in [*training, *validation]}


def test_a_missing_file_is_an_error_in_words(
    stories: Callable[[Path], BiLevelCommand], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stories(tmp_path).model
    assert main(["bilevel", "--model", model, "--demonstrations", str(tmp_path / "none.jsonl"), "--out", "x"]) == 1
    error = capsys.readouterr().err
    assert "none.jsonl" in error
    assert "Traceback" not in error
