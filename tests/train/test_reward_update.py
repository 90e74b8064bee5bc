"""The reward's step for every objective: what reaches the loss, what the policy is served, penalties, replay."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.eval import toy
from irlfast.losses import (
    Objective,
    RewardBatch,
    RewardLoss,
    airl_token_loss,
    maxent_irl_loss,
    objective_names,
    register_objective,
    registry,
)
from irlfast.rewards import create_reward_model, load_reward_model
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, RewardConfig
from irlfast.train.shaping import ShapingPotential

Make = Callable[..., BiLevelTrainer]


def weights(trainer: BiLevelTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.reward.parameters()])


def seen_batch(trainer: BiLevelTrainer, experience: Any = None) -> tuple[RewardBatch, dict[str, float]]:
    """The batch that the objective is given in one reward step, and the step's metrics."""
    batches: list[RewardBatch] = []
    loss = type(trainer.objective).loss

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(trainer.objective, name)

        def loss(self, batch: RewardBatch) -> Any:
            batches.append(batch)
            return loss(trainer.objective, batch)

    trainer.reward_update.objective = Spy()  # type: ignore[assignment]
    metrics = trainer.reward_step(trainer._gather() if experience is None else experience)
    trainer.reward_update.objective = trainer.objective
    assert len(batches) >= 1
    return batches[0], metrics


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_trains_through_the_interface(
    make_trainer: Make, small_config: BiLevelConfig, name: str, tmp_path: Path
) -> None:
    config = replace(small_config, reward=replace(small_config.reward, objective=name), reward_warmup_steps=1)
    trainer = make_trainer(config, mlp=True, out=tmp_path)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert len({frozenset(row) for row in train}) == 1  # the same names in every row
    common = {"loss", "expert_reward", "sample_reward", "margin", "auc", "max_abs_reward", "grad_norm", "lr"}
    assert {f"reward/{key}" for key in common} <= set(train[0])
    assert make_trainer(config, mlp=True, out=tmp_path).resume() == 4


def test_the_options_reach_the_objective_and_a_wrong_one_is_refused() -> None:
    made = RewardConfig(objective="gail", options={"policy_reward_kind": "logit"}, label_smoothing=0.1).make_objective()
    assert made.policy_reward_kind == "logit"  # type: ignore[attr-defined]
    assert made.label_smoothing == 0.1  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match="objective 'gail' has no option 'weight_clip'; its options: policy_reward_kind"
    ):
        RewardConfig(objective="gail", weight_clip=1.0)
    with pytest.raises(ValueError, match="objective 'gial' is unknown; known are maxent, weighted, airl, gail"):
        RewardConfig(objective="gial")
    with pytest.raises(ValueError, match=re.escape("centre stands in reward.options and in reward.centre: give one")):
        RewardConfig(options={"centre": 0.1}, centre=0.1)
    with pytest.raises(ValueError, match=r"reward\.replay = 4: objective 'airl' .* needs samples of one policy"):
        RewardConfig(objective="airl", replay=4)
    with pytest.raises(ValueError, match=r"reward\.r1 = -1"):
        RewardConfig(r1=-1)


@pytest.mark.parametrize("rollout", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_airl_needs_the_density_it_subtracts(rollout: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="objective 'airl' reads the sampler's density at demonstrations"):
        BiLevelConfig(rollout=SamplingParams(n=4, **rollout), reward=RewardConfig(objective="airl"))
    BiLevelConfig(rollout=SamplingParams(n=4, **rollout))  # max-ent has the samples' own log-probs


def test_the_batch_holds_the_log_probs_of_the_policy_that_sampled(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    """Also where a policy step has moved the policy in between."""
    trainer = make_trainer(replace(small_config, reward=replace(small_config.reward, objective="airl")))
    experience = trainer._gather()
    log_pi = toy.log_probs(trainer.policy).detach()
    log_base = toy.log_probs(trainer.reference).detach()  # type: ignore[arg-type]
    trainer.policy_step(experience)
    assert not torch.allclose(toy.log_probs(trainer.policy).detach(), log_pi)
    batch, _ = seen_batch(trainer, experience)
    expert, sample = (toy.string_indices(s.input_ids) for s in (experience.experts, experience.samples))
    for got, want in (
        (batch.expert_logprobs, log_pi[expert]),
        (batch.sample_logprobs, log_pi[sample]),
        (batch.log_proposal, log_pi[sample]),
        (batch.expert_log_base, log_base[expert]),
        (batch.log_base, log_base[sample]),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_log_probs_of_demonstrations_are_computed_only_where_asked(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    assert make_trainer(small_config)._gather().expert_logprobs is None


# What the policy is given


@pytest.mark.parametrize("kind", ["softplus", "logit", "logsigmoid"])
def test_the_policy_is_served_the_objectives_reward(make_trainer: Make, small_config: BiLevelConfig, kind: str) -> None:
    """On the scale of the raw reward's statistics, which are those that the checkpoint serves by."""
    reward = replace(small_config.reward, objective="gail", options={"policy_reward_kind": kind})
    trainer = make_trainer(replace(small_config, reward=reward))
    experience = trainer._gather()
    raw = trainer.rewards(experience.samples)
    metrics = trainer.policy_step(experience)
    normalizer = trainer.reward.normalizer
    assert float(normalizer.mean) == pytest.approx(float(raw.mean()), abs=1e-5)
    given = {
        "softplus": torch.nn.functional.softplus(raw),
        "logit": raw,
        "logsigmoid": torch.nn.functional.logsigmoid(raw),
    }[kind]
    want = (given.mean() - raw.mean()) / raw.std(correction=0)
    assert metrics["reward_served"] == pytest.approx(float(want), abs=1e-4)


def test_tokens_cannot_be_rewarded_with_what_is_made_of_whole_rewards(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    dense = replace(small_config, policy=replace(small_config.policy, dense_rewards=True))
    gail = replace(dense, reward=replace(small_config.reward, objective="gail"))
    with pytest.raises(
        ValueError, match=r"policy\.dense_rewards .* 'gail' .* use an objective whose policy reward is the"
    ):
        make_trainer(gail)
    logit = replace(gail, reward=replace(gail.reward, options={"policy_reward_kind": "logit"}))
    for config in (dense, logit):
        make_trainer(config)


@pytest.mark.parametrize("name", objective_names())
def test_the_policys_reward_is_monotone_in_the_learned_one(name: str) -> None:
    objective: Objective = RewardConfig(objective=name).make_objective()
    assert bool((objective.policy_reward(torch.linspace(-10, 10, 101, dtype=torch.float64)).diff() > 0).all())


# Penalties, projection


@pytest.mark.parametrize("name", ["gradient_penalty", "r1"])
def test_penalties_flatten_the_reward(make_trainer: Make, small_config: BiLevelConfig, name: str) -> None:
    def slope(weight: float) -> tuple[float, dict[str, float]]:
        reward = replace(small_config.reward, objective="gail", **{name: weight})
        trainer = make_trainer(replace(small_config, reward=reward))
        with torch.no_grad():
            trainer.reward.network[0].weight.mul_(10)
        for _ in range(30):
            metrics = trainer.reward_step(trainer._gather())
        return float(trainer.reward.network[0].weight.detach().norm()), metrics

    (free, without), (flat, penalised) = slope(0.0), slope(10.0)
    assert name not in without
    assert penalised[name] >= 0
    assert flat < 0.8 * free
    if name == "r1":  # a linear reward has one slope, the norm of its weights
        assert penalised["r1"] == pytest.approx(flat**2 / 2, rel=0.2)


def test_penalties_need_pooled_features(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(replace(small_config, reward=replace(small_config.reward, token_statistics=False)))
    model = create_reward_model({"hidden_size": toy.NUM_FEATURES, "width": 8, "heads": 2}, "trajectory")
    from irlfast.train.reward_update import RewardUpdate

    config = replace(trainer.config, reward=replace(trainer.config.reward, r1=1.0))
    with pytest.raises(ValueError, match="take a reward on pooled features, and TrajectoryRewardModel is none"):
        RewardUpdate(model, config)


def test_an_objective_of_ones_own_may_read_features(
    make_trainer: Make, small_config: BiLevelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))

    @register_objective("featured")
    @dataclass(frozen=True, kw_only=True)
    class Featured(Objective):
        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"expert_features", "sample_features", "score"})

        @property
        def takes_replay(self) -> bool:
            return True

        def loss(self, batch: RewardBatch) -> RewardLoss:
            assert batch.score is not None
            # The reward is the score of the features, replayed rows included.
            torch.testing.assert_close(batch.score(batch.require("expert_features", "me")), batch.expert_rewards)
            torch.testing.assert_close(batch.score(batch.require("sample_features", "me")), batch.sample_rewards)
            return RewardLoss(batch.sample_rewards.mean(), {"rows": torch.tensor(float(len(batch.sample_rewards)))})

    reward = replace(small_config.reward, objective="featured", replay=5)
    trainer = make_trainer(replace(small_config, reward=reward))
    assert trainer.reward_step(trainer._gather())["rows"] == 12
    assert trainer.reward_step(trainer._gather())["rows"] == 17


def test_ng_russell_stays_on_the_unit_ball(make_trainer: Make, small_config: BiLevelConfig) -> None:
    reward = RewardConfig(objective="max_margin", optimizer=OptimizerConfig(lr=0.5, max_grad_norm=0.0))
    trainer = make_trainer(replace(small_config, reward=reward))
    for _ in range(5):
        trainer.reward_step(trainer._gather())
        assert float(weights(trainer).norm()) == pytest.approx(1.0, abs=1e-5)


# Members


def test_members_learn_each_from_their_own_rewards(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    width = toy.NUM_FEATURES + 2
    torch.manual_seed(3)
    options = {"options": {"hidden_size": width, "hidden_sizes": ()}, "members": 3}
    ensemble = create_reward_model(options, "ensemble")
    from irlfast.train.reward_update import RewardUpdate

    update = RewardUpdate(ensemble, small_config)
    experience = trainer._gather()
    metrics = update.step(experience, trainer._score(experience.experts))
    gradients = [part.network[0].weight.grad for part in ensemble.parts.values()]
    assert all(bool(gradient.any()) for gradient in gradients)
    assert not torch.equal(gradients[0], gradients[1])
    # The loss that is logged is the mean over the members, before the step.
    torch.manual_seed(3)
    fresh = create_reward_model(options, "ensemble")
    expert_scored = trainer._score(experience.experts)
    losses = [
        maxent_irl_loss(
            part(*expert_scored.inputs),
            part(*experience.scored.inputs),
            experience.samples.sampler_logprobs.sum(1),
            log_base=experience.scored.log_base,
            expert_groups=experience.experts.groups,
            sample_groups=experience.samples.groups,
        ).loss
        for part in fresh.parts.values()
    ]
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), abs=1e-5)


# Replay


def test_replayed_samples_join_under_their_own_samplers_log_prob(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    trainer = make_trainer(replace(small_config, reward=replace(small_config.reward, replay=20)))
    first = trainer._gather()
    old_log_pi = toy.log_probs(trainer.policy).detach()
    assert len(seen_batch(trainer, first)[0].sample_rewards) == 12
    with torch.no_grad():
        trainer.policy.table.mul_(0.3)
    second = trainer._gather()
    batch, _ = seen_batch(trainer, second)
    assert batch.log_proposal is not None
    assert len(batch.sample_rewards) == 24
    strings = toy.string_indices(first.samples.input_ids)
    torch.testing.assert_close(batch.log_proposal[12:], old_log_pi[strings], rtol=0, atol=1e-5)
    rewards = trainer.rewards(first.samples)
    assert len(rewards) == 12
    third, _ = seen_batch(trainer)
    assert len(third.sample_rewards) == 12 + 20  # the oldest four gave way


def test_replay_resumes_to_the_same_bits(make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path) -> None:
    config = replace(small_config, iterations=6, reward=replace(small_config.reward, replay=30), checkpoint_every=3)
    whole = make_trainer(config, mlp=True, out=tmp_path / "whole")
    last = whole.train()
    make_trainer(replace(config, iterations=3), mlp=True, out=tmp_path / "cut").train()
    resumed = make_trainer(config, mlp=True, out=tmp_path / "cut")
    assert resumed.resume() == 3
    assert resumed.train() == last
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.replay.state_dict() == whole.replay.state_dict()


# AIRL token by token


def token_trainer(
    small_config: BiLevelConfig, toy_rows: Any, out: Path | None = None, **options: Any
) -> BiLevelTrainer:
    """AIRL by token with a small transformer as the reward, on the toy language, KL to a random reference."""
    reward = replace(small_config.reward, objective="airl", options={"form": "token", **options})
    torch.manual_seed(5)
    policy, reference = toy.ToyPolicy(), toy.ToyPolicy()
    torch.nn.init.normal_(reference.table)
    policy.load_state_dict(reference.state_dict())
    rows = toy_rows(80)
    model = {"hidden_size": toy.NUM_FEATURES + 2, "width": 8, "heads": 2, "layers": 1, "reduction": "sum"}
    return BiLevelTrainer(
        policy=policy,
        engine=TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD),
        reward=create_reward_model(model, "trajectory"),
        demonstrations=rows[:64],
        heldout=rows[64:],
        config=replace(small_config, beta=0.5, reward=reward),
        pad_token_id=toy.PAD,
        out=out,
        reference=reference,
    )


def test_the_token_form_gets_rewards_log_probs_and_potentials_at_their_tokens(
    small_config: BiLevelConfig, toy_rows: Any
) -> None:
    trainer = token_trainer(small_config, toy_rows, gamma=0.9)
    experience = trainer._gather()
    with torch.no_grad():
        trainer.policy.table.mul_(0.5)  # what counts is the policy that sampled
        raw = trainer.rewards(experience.samples)
    batch, metrics = seen_batch(trainer, experience)
    for tokens, side in ((batch.expert_tokens, experience.experts), (batch.sample_tokens, experience.samples)):
        assert tokens is not None
        assert torch.equal(tokens.mask, side.response_mask)
        # The policy was its reference when it sampled: log pi - log b is 0 at every token.
        torch.testing.assert_close(tokens.logprobs, torch.zeros_like(tokens.logprobs), rtol=0, atol=1e-5)
        assert tokens.potentials is not None
        assert not bool(tokens.potentials[~tokens.mask].any())
    assert batch.sample_tokens is not None
    torch.testing.assert_close(batch.sample_tokens.rewards.detach().sum(1), raw / 0.5, rtol=0, atol=1e-5)
    want = airl_token_loss(batch.expert_tokens, batch.sample_tokens, gamma=0.9).loss  # type: ignore[arg-type]
    assert metrics["loss"] == pytest.approx(float(want.detach()), abs=1e-6)
    shaping = trainer.reward_update.shaping
    assert shaping is not None
    assert all(bool(p.grad.any()) for p in shaping.network[1:].parameters())  # type: ignore[union-attr]


def test_the_potential_reads_the_state_before_each_token() -> None:
    torch.manual_seed(0)
    shaping = ShapingPotential(3)
    states, mask = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    states.requires_grad_()
    potentials = shaping(states, mask)
    (gradient,) = torch.autograd.grad(potentials[0, 2], states)
    assert bool(gradient[0, 1].any())
    gradient[0, 1] = 0
    assert not bool(gradient.any())
    dirty = states.detach().clone()
    dirty[0, 3:] = torch.nan
    dirty[1, :1] = torch.nan
    assert torch.equal(shaping(dirty, mask), potentials.detach())


def test_the_token_form_trains_resumes_and_keeps_the_reward_alone(
    small_config: BiLevelConfig, toy_rows: Any, tmp_path: Path
) -> None:
    whole = token_trainer(replace(small_config, iterations=4), toy_rows, tmp_path / "whole")
    last = whole.train()
    token_trainer(replace(small_config, iterations=2), toy_rows, tmp_path / "cut").train()
    resumed = token_trainer(replace(small_config, iterations=4), toy_rows, tmp_path / "cut")
    assert resumed.resume() == 2
    assert resumed.train() == last
    for module in ("shaping", "reward"):
        a, b = (getattr(t.reward_update, module).state_dict() for t in (resumed, whole))
        assert all(torch.equal(a[name], b[name]) for name in a)
    reward = load_reward_model(tmp_path / "whole" / "checkpoints" / "step-4" / "reward")
    experience = whole._gather()
    assert torch.equal(reward.serve(*experience.scored.inputs), whole.reward.serve(*experience.scored.inputs))
    assert not any("shaping" in name for name in reward.state_dict())


def test_the_token_form_needs_a_reward_that_is_a_sum_over_tokens(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    reward = replace(small_config.reward, objective="airl", options={"form": "token"})
    with pytest.raises(ValueError, match="needs a reward that is a sum over tokens, and RewardModel is none"):
        make_trainer(replace(small_config, reward=reward))
    model = create_reward_model({"hidden_size": 4, "width": 8, "heads": 2}, "trajectory")
    with pytest.raises(NotImplementedError, match="is no sum over tokens: use the reward model 'trajectory'"):
        model.token_terms(torch.zeros(1, 3, 4), torch.ones(1, 3).bool(), torch.ones(1, 3).bool())
