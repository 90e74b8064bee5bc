"""The toy demonstration's helpers: its data, its trainer, and what toy_recovery reports."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from irlfast.demo import toy as demo
from irlfast.eval import toy
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelTrainer


def linear_weights(trainer: BiLevelTrainer) -> torch.Tensor:
    weight = trainer.reward.network[0].weight
    assert isinstance(weight, torch.Tensor)
    return weight


@pytest.mark.parametrize(("factor", "beta"), [(1.0, 1.0), (3.0, 3.0)])
def test_recovery_reads_the_trainers_reward_and_its_beta(factor: float, beta: float) -> None:
    trainer = demo.make_toy_trainer(0, replace(demo.toy_config(), beta=beta))
    with torch.no_grad():
        linear_weights(trainer).copy_(factor * torch.tensor([toy.TRUE_WEIGHTS]))
    got = demo.toy_recovery(trainer)
    assert got.pearson == pytest.approx(1.0, abs=1e-6)
    assert got.tv == pytest.approx(0.0, abs=1e-6)


def test_recovery_of_a_reward_by_hand() -> None:
    """A reward that only counts zeros: its correlation with the truth, from the formula."""
    trainer = demo.make_toy_trainer(0)
    with torch.no_grad():
        linear_weights(trainer).copy_(torch.tensor([[1.0, 0, 0, 0, 0]]))
    zeros = torch.tensor([float(string.count(0)) for string in toy.all_strings()], dtype=torch.float64)
    got = demo.toy_recovery(trainer)
    assert got.pearson == pytest.approx(float(torch.corrcoef(torch.stack([zeros, toy.true_rewards()]))[0, 1]), abs=1e-6)
    tv = 0.5 * float((torch.softmax(zeros, 0) - toy.expert_log_probs().exp()).abs().sum())
    assert got.tv == pytest.approx(tv, abs=1e-6)


def test_demonstrations_follow_the_expert_and_the_seed() -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        trainer = demo.make_toy_trainer(seed)
        return [tuple(row.response_ids) for row in trainer.draws.draw(demo.DEMONSTRATIONS)]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    number = {string: i for i, string in enumerate(toy.all_strings())}
    counts = torch.bincount(torch.tensor([number[tuple(s)] for s in first]), minlength=toy.NUM_STRINGS)
    expected = toy.expert_log_probs().exp() * demo.DEMONSTRATIONS
    assert float(((counts - expected) ** 2 / expected).sum()) < 120 + 5 * (2 * 120) ** 0.5
    assert len(demo.make_toy_trainer(0).heldout) == demo.toy_config().eval_prompts


def test_trainer_starts_uniform_and_the_seed_overrides_the_configuration(tmp_path: Path) -> None:
    trainer = demo.make_toy_trainer(7, demo.toy_config(0), tmp_path)
    assert trainer.config.seed == 7
    assert trainer.out == tmp_path
    assert not trainer.policy.table.any()
    assert trainer.config.regularizer == "entropy"
    assert trainer.reference is None
    again = demo.make_toy_trainer(7)
    assert torch.equal(linear_weights(again), linear_weights(trainer))
    assert not torch.equal(linear_weights(demo.make_toy_trainer(8)), linear_weights(trainer))


def test_a_short_run_already_moves_towards_the_expert() -> None:
    config = replace(
        demo.toy_config(), iterations=40, prompts_per_step=64, rollout=SamplingParams(max_new_tokens=5, n=64)
    )
    trainer = demo.make_toy_trainer(0, config)
    before = demo.toy_recovery(trainer)
    trainer.train()
    after = demo.toy_recovery(trainer)
    assert after.pearson > max(0.8, before.pearson)
    assert after.tv < before.tv
