"""samples.jsonl: what an evaluation keeps for a person, and that it survives a resume."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.eval import toy
from irlfast.rewards import TokenRewards
from irlfast.rollout import Sequences
from irlfast.train import BiLevelConfig, BiLevelTrainer
from irlfast.train.samples import Judgement, evaluation_record

Make = Callable[..., BiLevelTrainer]


def batch(responses: list[list[int]]) -> Sequences:
    return Sequences.from_token_lists([[4]] * len(responses), responses, toy.PAD)


def test_the_best_and_worst_are_kept_in_order_and_none_twice() -> None:
    samples = batch([[0, 3], [1, 1, 3], [2, 3], [0, 1, 2, 3], [2, 2, 3]])
    rewards = torch.tensor([0.1, -2.0, 3.0, 0.5, float("inf")])
    parts = {"style": torch.arange(5.0)}

    def tokens(part: Sequences) -> TokenRewards:
        return TokenRewards(part.input_ids.float() * part.response_mask, "sum")

    record = evaluation_record(
        7,
        policy=(samples, Judgement(rewards=rewards, components=parts)),
        experts=(samples.select([0, 1]), Judgement(rewards=rewards[:2])),
        token_rewards=tokens,
        decode=lambda ids: [f"<{i}>" for i in ids],
        level=0.25,
        scale=2.0,
        keep=2,
    )
    assert record["iteration"] == 7
    assert (record["reward_level"], record["reward_scale"]) == (0.25, 2.0)
    assert record["policy_rewards"] == [0.1, -2.0, 3.0, 0.5, None]
    of_policy = [row for row in record["rows"] if row["source"] == "policy"]
    assert [row["index"] for row in of_policy] == [4, 2, 0, 1]
    assert of_policy[1] == {
        "source": "policy",
        "index": 2,
        "prompt": "<4>",
        "tokens": ["<2>", "<3>"],
        "ids": [2, 3],
        "reward": 3.0,
        "components": {"style": 2.0},
        "token_rewards": [2.0, 3.0],
        "kind": "sum",
    }
    of_experts = [row for row in record["rows"] if row["source"] == "demonstration"]
    assert [row["index"] for row in of_experts] == [0, 1]
    json.dumps(record, allow_nan=False)


def test_without_a_tokenizer_ids_are_written() -> None:
    samples = batch([[0, 3]])
    judged = (samples, Judgement(rewards=torch.tensor([1.0])))
    (row, _) = evaluation_record(0, policy=judged, experts=judged)["rows"]
    assert (row["prompt"], row["tokens"]) == ("4 ", ["0 ", "3 "])
    assert "token_rewards" not in row


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_evaluation_leaves_a_record_that_agrees_with_its_metrics(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path
) -> None:
    trainer = make_trainer(small_config, out=tmp_path)
    trainer.train()
    records = rows(tmp_path / "samples.jsonl")
    evaluations = [row for row in rows(tmp_path / "metrics.jsonl") if row["kind"] == "eval"]
    assert [r["iteration"] for r in records] == [e["iteration"] for e in evaluations] == [0, 2, 4]
    for record, evaluation in zip(records, evaluations, strict=True):
        for name, metric in (("policy_rewards", "reward_sample"), ("expert_rewards", "reward_expert")):
            assert sum(record[name]) / 16 == pytest.approx(evaluation[metric], rel=1e-4, abs=1e-5)
        for row in record["rows"]:
            assert sum(row["token_rewards"]) == pytest.approx(row["reward"], rel=1e-3, abs=1e-4)


def test_a_resumed_run_has_the_same_records_and_warnings(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path
) -> None:
    # Lines so drawn that rules speak at every evaluation.
    config = replace(small_config, monitors=replace(small_config.monitors, auc_blind=1.0, ess=1.0))
    make_trainer(config, out=tmp_path / "whole").train()
    short = make_trainer(replace(config, iterations=3, checkpoint_every=2), out=tmp_path / "run")
    step = short._iterate

    def stop_in_the_third() -> dict[str, float]:
        if short.iteration == 2:
            raise KeyboardInterrupt
        return step()

    short._iterate = stop_in_the_third  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        short.train()
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rows": []}\n{"iteration": 4, "ro')  # from a run that had gone further
    resumed = make_trainer(config, out=tmp_path / "run")
    resumed.resume()
    resumed.train()
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()

    def warnings(folder: str) -> list[dict[str, Any]]:
        found = [row for row in rows(tmp_path / folder / "metrics.jsonl") if row["kind"] == "warning"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    assert warnings("run") == warnings("whole")
    assert {row["rule"] for row in warnings("run")} >= {"auc_blind", "ess"}


def test_a_run_without_a_folder_warns_nobody_and_writes_nothing(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    assert "reward_length" in make_trainer(replace(small_config, iterations=1)).train()


def test_a_reward_is_judged_without_dropout(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config, mlp=True)
    trainer.reward.train()
    samples = trainer._gather().samples
    assert torch.equal(trainer.rewards(samples), trainer.rewards(samples))
    assert trainer.reward.training
