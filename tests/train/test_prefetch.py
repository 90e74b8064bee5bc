"""Sampling ahead: what is sampled under which weights, that nothing is lost, and that a resumed run repeats."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.eval import toy
from irlfast.rollout import Rollouts, SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig
from irlfast.train.prefetch import Prefetch, Request

Make = Callable[..., BiLevelTrainer]


class Recorder:
    """An engine on a copy of a policy that notes in which order it is asked for what."""

    def __init__(self, policy: Any) -> None:
        self.inner = TransformersEngine(copy.deepcopy(policy), eos_token_id=toy.EOS, pad_token_id=toy.PAD)
        self.calls: list[str] = []
        self.closed = False

    def generate(self, prompts: Any, params: SamplingParams, *, return_hidden_states: bool = False) -> Rollouts:
        self.calls.append(f"sample under {self.inner.version}")
        assert threading.current_thread().name.startswith("irlfast-prefetch")
        return self.inner.generate(prompts, params)

    def update_weights(self, state_dict: Any, version: int) -> None:
        self.calls.append(f"update to {version}")
        self.inner.update_weights(state_dict, version)

    def close(self) -> None:
        self.closed = True


def request(seed: int) -> Request:
    return Request(drawn=[], prompts=[[toy.BOS]], params=SamplingParams(max_new_tokens=4, n=2, seed=seed))


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_batch_is_sampled_under_the_weights_of_a_fixed_number_of_updates_before(ahead: int) -> None:
    policy = toy.ToyPolicy()
    prefetch = Prefetch(Recorder(policy), policy, ahead)
    seeds = iter(range(100))
    versions = []
    for step in range(1, 7):
        taken, samples = prefetch.take(lambda: request(next(seeds)))
        assert taken.params.seed == step - 1  # in the order drawn, none left out
        versions.append(int(samples.versions.max()))
        prefetch.update_weights(None, step)
    prefetch.close()
    assert versions == [max(0, step - 1 - ahead) for step in range(1, 7)]
    assert prefetch.engine.closed
    assert prefetch.waited > 0


def test_an_update_takes_the_weights_as_they_were_when_it_was_asked_for() -> None:
    policy = toy.ToyPolicy()
    recorder = Recorder(policy)
    prefetch = Prefetch(recorder, policy, 1)
    with torch.no_grad():
        policy.table.fill_(1.0)
        prefetch.update_weights(None, 1)
        policy.table.fill_(2.0)
    prefetch.generate([[toy.BOS]], SamplingParams(max_new_tokens=2, seed=0))
    assert float(recorder.inner.model.table.detach().min()) == 1.0
    prefetch.close()


def test_after_a_failed_update_nothing_is_sampled() -> None:
    policy = toy.ToyPolicy()
    recorder = Recorder(policy)
    prefetch = Prefetch(recorder, policy, 1)
    prefetch.update_weights({"no such tensor": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="unknown"):
        prefetch.generate([[toy.BOS]], SamplingParams(max_new_tokens=2))
    with pytest.raises(ValueError, match="unknown"):
        prefetch.take(lambda: request(0))
    with pytest.raises(ValueError, match="unknown"):
        prefetch.update_weights(None, 2)
    assert recorder.calls == ["update to 1"]
    prefetch.close()


def test_an_engine_on_the_trained_module_is_refused() -> None:
    policy = toy.ToyPolicy()
    engine = TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD)
    with pytest.raises(ValueError, match="needs weights of its own"):
        Prefetch(engine, policy, 1)
    with pytest.raises(ValueError, match="at least 1"):
        Prefetch(Recorder(policy), policy, 0)


@pytest.fixture
def overlapped(make_trainer: Make) -> Make:
    """A trainer whose engine samples from a copy of its policy, `config.overlap` batches ahead."""

    def make(config: BiLevelConfig, out: Path | None = None) -> BiLevelTrainer:
        trainer = make_trainer(replace(config, overlap=0), out=out)
        engine = TransformersEngine(copy.deepcopy(trainer.policy), eos_token_id=toy.EOS, pad_token_id=toy.PAD)
        return BiLevelTrainer(
            policy=trainer.policy, engine=engine, reward=trainer.reward, demonstrations=trainer.draws._items,
            heldout=trainer.heldout, config=config, pad_token_id=toy.PAD, out=out, reference=trainer.reference,
        )  # fmt: skip

    return make


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_resumed_run_repeats_an_uninterrupted_one(
    overlapped: Make, small_config: BiLevelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    config = replace(small_config, overlap=ahead, iterations=6)
    whole = overlapped(config, tmp_path / "whole")
    whole.train()

    cut = overlapped(config, tmp_path / "cut")
    step = cut.policy_step

    def stop_in_the_fifth(experience: Any) -> dict[str, float]:
        if cut.iteration == 4:
            raise KeyboardInterrupt
        return step(experience)

    monkeypatch.setattr(cut, "policy_step", stop_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = overlapped(config, tmp_path / "cut")
    assert resumed.resume() == 4
    resumed.train()
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert torch.equal(resumed.policy.table, whole.policy.table)
    trained = [row for row in rows_of(tmp_path / "whole") if row["kind"] == "train"]
    assert [row["policy/lag_max"] for row in trained[2:]] == [ahead] * 4


def test_without_its_batches_under_way_a_checkpoint_would_not_repeat(
    overlapped: Make, small_config: BiLevelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deliberate break: the batches are drawn again, but sampled anew, under the newer weights."""
    config = replace(small_config, overlap=1, iterations=4)
    whole = overlapped(config, tmp_path / "whole")
    whole.train()
    first = overlapped(replace(config, iterations=2), tmp_path / "cut")
    first.train()
    resumed = overlapped(config, tmp_path / "cut")
    monkeypatch.setattr(Prefetch, "load", lambda self, path, draw: None)
    resumed.resume()
    resumed.train()
    assert rows_of(tmp_path / "cut") != rows_of(tmp_path / "whole")


def test_overlap_learns_as_the_loop_in_turn_does(overlapped: Make, make_trainer: Make, small_config: Any) -> None:
    """On the toy language, from the same start: the reward separates, and both runs come out near one another."""
    config = replace(
        small_config, iterations=60, prompts_per_step=64, eval_every=60, eval_prompts=64,
        rollout=SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=8),
        policy=replace(small_config.policy, optimizer=OptimizerConfig(lr=0.05)),
    )  # fmt: skip
    results = {}
    for ahead, make in ((0, make_trainer), (1, overlapped)):
        trainer = make(replace(config, overlap=ahead))
        start = trainer.evaluate()
        results[ahead] = (start, trainer.train())
    for start, end in results.values():
        assert end["expert_token_logprob"] > start["expert_token_logprob"] + 0.05
    assert abs(results[0][1]["expert_token_logprob"] - results[1][1]["expert_token_logprob"]) < 0.05
