"""Bugs of the bi-level system before this one, each by its name. What they did is said in the first line of each test.

The bug of weights that differ is in test_expert_is_policy.py, those of the extraction in test_extraction.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.losses import RewardBatch, make_objective, objective_names
from irlfast.rewards import RewardModel, RewardModelConfig, pooling
from irlfast.train import BiLevelConfig, BiLevelTrainer
from irlfast.train.experience import Experience
from irlfast.train.reward_update import RewardUpdate

Make = Callable[..., BiLevelTrainer]


# Hidden states


def test_bug_hidden_states_were_made_up_and_the_shape_error_swallowed(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    """Rewards read a hash of the text in place of hidden states, since those had raised. Here the error surfaces."""
    trainer = make_trainer(small_config)
    experience = trainer._gather()
    wrong = RewardModel(RewardModelConfig(hidden_size=3))
    with pytest.raises(ValueError, match="hidden_states have width 7, the reward model was made for 3"):
        RewardUpdate(wrong, small_config).step(experience, trainer._score(experience.experts))
    # And the states are the frozen model's: another model, another reward.
    before = trainer.rewards(experience.samples)
    with torch.no_grad():
        trainer.reference.table.add_(torch.linspace(0, 2, 4))  # type: ignore[union-attr, operator]
    assert not torch.allclose(trainer.rewards(experience.samples), before)


def padding_gradient(objective: str) -> float:
    """Largest gradient that a loss sends to hidden states at padding."""
    torch.manual_seed(0)
    ids = toy.all_input_ids()
    mask = (ids != toy.PAD) & (ids != toy.BOS)
    reward = RewardModel(RewardModelConfig(hidden_size=4, hidden_sizes=(8,), pooling=("last", "mean", "max")))
    states = torch.randn(toy.NUM_STRINGS, ids.shape[1], 4, requires_grad=True)
    rewards = reward(states, mask)
    batch = RewardBatch(
        expert_rewards=rewards[:60],
        sample_rewards=rewards[60:],
        log_proposal=torch.randn(61),
        expert_logprobs=torch.randn(60),
        sample_logprobs=torch.randn(61),
    )
    (gradient,) = torch.autograd.grad(make_objective(objective).loss(batch).loss, states)
    assert float(gradient[mask].abs().max()) > 0
    return float(gradient[~mask].abs().max())


@pytest.mark.parametrize("objective", objective_names())
def test_bug_the_last_column_was_read_padding_or_not(objective: str) -> None:
    """`[:, -1]` reads padding in every row but the longest: the gradient there is exactly 0 here."""
    assert padding_gradient(objective) == 0.0


def test_reading_the_last_column_fails_the_padding_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pooling._POOLS, "last", lambda states, mask: states[:, -1])
    for objective in ("maxent", "airl", "bradley_terry"):
        assert padding_gradient(objective) > 1e-4


# Demonstrations


def test_bug_demonstrations_of_different_lengths_did_not_collate(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    """Rows were stacked as they came. Here each keeps its own length, and padding is outside its masks."""
    strings = [s for s in toy.all_strings() if len(s) in (1, 3, 5)][:16]
    rows = [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=s, truncated=False) for s in strings]
    experience = make_trainer(small_config, demonstrations=rows)._gather()
    assert sorted(experience.experts.response_lengths.tolist()) == sorted(map(len, strings))
    assert len(set(map(len, strings))) == 3


def test_bug_only_the_first_16_demonstrations_were_ever_used(make_trainer: Make, small_config: BiLevelConfig) -> None:
    strings = toy.all_strings()
    rows = [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=strings[i], truncated=False) for i in range(64)]
    trainer = make_trainer(small_config, demonstrations=rows)
    drawn = [toy.string_indices(trainer._gather().experts.input_ids).tolist() for _ in range(4)]
    assert sorted(i for part in drawn for i in part) == list(range(64))
    assert all(part != list(range(16)) for part in drawn)


def test_bug_demonstrations_had_no_eos_and_rollouts_had(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """The reward then only had to look for EOS. Here both sides end by it, and a reward of it tells nothing."""
    trainer = make_trainer(small_config)
    experience = trainer._gather()

    def ends(side: object) -> Tensor:
        ids, mask = side.input_ids, side.response_mask  # type: ignore[attr-defined]
        return ids[torch.arange(len(ids)), torch.where(mask, torch.arange(ids.shape[1]), 0).amax(1)] == toy.EOS

    assert bool(ends(experience.experts).all())
    assert bool(ends(experience.samples).all())
    batch = RewardBatch(
        expert_rewards=ends(experience.experts).float(),
        sample_rewards=ends(experience.samples).float(),
    )
    assert float(batch.summary()["auc"]) == 0.5


# The loop


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_bug_a_ratio_of_r_gave_r_plus_1_policy_updates(
    make_trainer: Make, small_config: BiLevelConfig, ratio: int
) -> None:
    trainer = make_trainer(replace(small_config, iterations=2, policy_steps=ratio, prompts_per_step=4))
    trainer.train()
    assert trainer.policy_optimizer.step_count == 2 * ratio
    assert trainer.reward_optimizer.step_count == 2


@pytest.mark.parametrize("objective", ["maxent", "airl", "gail"])
def test_bug_the_learned_reward_never_reached_the_policy(
    make_trainer: Make, small_config: BiLevelConfig, objective: str
) -> None:
    """Rollouts kept the reward they came with. Here what is learned between two policy steps changes the second."""

    def policy_after(learn: bool) -> Tensor:
        config = replace(small_config, reward=replace(small_config.reward, objective=objective))
        trainer = make_trainer(config)
        experience = trainer._gather()
        if learn:
            for _ in range(20):
                trainer.reward_step(experience)
        trainer.policy_step(experience)
        return trainer.policy.table.detach()

    assert torch.equal(policy_after(False), policy_after(False))
    assert not torch.allclose(policy_after(True), policy_after(False))


def test_bug_gradients_were_never_cleared(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """No zero_grad: each step added to the gradients of all before it. Here a step's gradient is its own."""
    trainer = make_trainer(small_config)
    experience = trainer._gather()
    trainer.reward_step(experience)
    weight = trainer.reward.network[0].weight
    with torch.no_grad():
        before = weight.clone()
    second = trainer.reward_step(experience)

    fresh = make_trainer(small_config)
    with torch.no_grad():
        fresh.reward.network[0].weight.copy_(before)
    same = Experience(experts=experience.experts, samples=experience.samples, scored=experience.scored)
    assert fresh.reward_step(same)["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-6)


# Objectives


@pytest.mark.parametrize("objective", ["max_margin", "bradley_terry", "spin"])
def test_bug_accuracy_compared_each_reward_with_zero(objective: str) -> None:
    """Two rewards above 0 counted as one mistake. Here a pair counts by its difference, wherever its level is."""
    for level in (-100.0, 0.0, 100.0):
        batch = RewardBatch(
            expert_rewards=level + torch.tensor([1.0, 2.0, 3.0]), sample_rewards=level + torch.tensor([0.5, 0.0, -1.0])
        )
        assert float(make_objective(objective).loss(batch).metrics["accuracy"]) == 1.0


def test_bug_airl_left_log_pi_out() -> None:
    """The classifier's logit was f alone, which is GAIL. Here f = log pi on both sides is what cannot be told apart."""
    log_pi = torch.tensor([-3.0, -1.0, -7.0])
    batch = RewardBatch(expert_rewards=log_pi, sample_rewards=log_pi, expert_logprobs=log_pi, sample_logprobs=log_pi)
    got = make_objective("airl").loss(batch).loss
    assert float(got) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())
    assert float(make_objective("gail").loss(batch).loss) > float(got) + 1


def test_bug_only_differences_may_count_in_the_reward_loss() -> None:
    """Weights 1 and .1 paid for a higher level. Here max-ent, contrastive and pairwise losses do not see the level."""
    torch.manual_seed(0)
    expert, sample, log_q = torch.randn(4).double(), torch.randn(6).double(), torch.randn(6).double()
    for name in ("maxent", "weighted", "contrastive", "max_margin", "bradley_terry", "spin"):
        values = [
            make_objective(name)
            .loss(RewardBatch(expert_rewards=expert + c, sample_rewards=sample + c, log_proposal=log_q))
            .loss
            for c in (0.0, 1000.0)
        ]
        torch.testing.assert_close(*values, rtol=0, atol=1e-9)
