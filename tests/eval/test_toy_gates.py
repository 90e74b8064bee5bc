"""Gates on the toy language: maxent_irl_loss must recover the reward, and each deliberate break must not.

2,000 demonstrations, a linear reward. With exact Z the samples are the 121 strings themselves; with the estimated one
they are 256 fresh strings a step from the policy that picks uniformly among the four tokens. Its strings are far from
equally likely (4^-1 to 4^-4), so an estimate without -log q is wrong.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irlfast import losses
from irlfast.eval import toy
from irlfast.losses import reward as reward_module
from irlfast.ops import ImportanceWeights, importance_weights

EXACT_GATE = toy.RewardRecovery(pearson=0.99, tv=0.06)
SAMPLED_GATE = toy.RewardRecovery(pearson=0.985, tv=0.10)
SEEDS = (0, 1, 2)

Break = Callable[[pytest.MonkeyPatch], None]


def passes(got: toy.RewardRecovery, gate: toy.RewardRecovery) -> bool:
    return got.pearson >= gate.pearson and got.tv <= gate.tv


def recover_with_exact_z(seed: int) -> toy.RewardRecovery:
    uniform = torch.full((toy.NUM_STRINGS,), -math.log(toy.NUM_STRINGS), dtype=torch.float64)
    return _recover(seed, lambda step: torch.arange(toy.NUM_STRINGS), uniform)


def recover_with_samples(seed: int) -> toy.RewardRecovery:
    log_q = toy.log_probs(toy.ToyPolicy(dtype=torch.float64)).detach()
    return _recover(seed, lambda step: toy.sample_strings(256, seed=1000 * seed + step, log_probs=log_q), log_q)


def _recover(seed: int, samples_at: Callable[[int], Tensor], log_q: Tensor) -> toy.RewardRecovery:
    phi = toy.features()
    demonstrations = toy.sample_strings(2000, seed=seed)
    weights = torch.zeros(toy.NUM_FEATURES, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    for step in range(300):
        rewards, drawn = phi @ weights, samples_at(step)
        optimiser.zero_grad()
        losses.maxent_irl_loss(rewards[demonstrations], rewards[drawn], log_q[drawn]).loss.backward()
        optimiser.step()
        schedule.step()
    return toy.reward_recovery(phi @ weights)


def divergence_after_policy_steps(*, entropy: bool) -> float:
    """KL(p_E || pi) after 300 RLOO steps on the true reward, less log pi (the entropy term) where asked."""
    torch.manual_seed(0)
    policy, ids, rewards = toy.ToyPolicy(), toy.all_input_ids(), toy.true_rewards().float()
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(300):
        log_pi = toy.log_probs(policy).detach()
        drawn = torch.multinomial(log_pi.exp(), 256, replacement=True)
        rows = ids[drawn]
        logits = policy(input_ids=rows).logits[:, :-1]
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
        returns = rewards[drawn] - log_pi[drawn] * entropy
        advantages = losses.group_advantages(returns, torch.zeros_like(drawn), kind="rloo")
        loss = losses.policy_loss(
            logprobs, advantages, rows[:, 1:] != toy.PAD, kind="reinforce", aggregation="seq_mean_token_sum"
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    log_p = toy.expert_log_probs()
    return float((log_p.exp() * (log_p - toy.log_probs(policy).detach().double())).sum())


def drop_log_q(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(log_target: Tensor, log_proposal: Tensor, **options: object) -> ImportanceWeights:
        return importance_weights(log_target, torch.zeros_like(log_proposal), **options)

    monkeypatch.setattr(reward_module, "importance_weights", broken)


def drop_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample counts the same: the normaliser's gradient is the plain mean of the samples'."""

    def broken(log_target: Tensor, log_proposal: Tensor, **options: object) -> ImportanceWeights:
        right = importance_weights(log_target, log_proposal, **options)
        return right._replace(log_normalizer=(log_target - log_proposal).mean(dim=0, keepdim=True))

    monkeypatch.setattr(reward_module, "importance_weights", broken)


def flip_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.maxent_irl_loss

    def broken(*args: Tensor) -> losses.RewardLoss:
        result = right(*args)
        return result._replace(loss=-result.loss)

    monkeypatch.setattr(losses, "maxent_irl_loss", broken)


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_normaliser_recovers_the_reward(seed: int) -> None:
    assert passes(recover_with_exact_z(seed), EXACT_GATE)


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weighted_normaliser_recovers_the_reward(seed: int) -> None:
    assert passes(recover_with_samples(seed), SAMPLED_GATE)


@pytest.mark.parametrize(
    ("break_it", "pearson_at_most", "tv_at_least"),
    [(drop_weights, 0.9, 0.9), (flip_sign, 0.0, 0.9)],
)
def test_exact_gate_fails_broken_code(
    monkeypatch: pytest.MonkeyPatch, break_it: Break, pearson_at_most: float, tv_at_least: float
) -> None:
    break_it(monkeypatch)
    got = recover_with_exact_z(0)
    assert not passes(got, EXACT_GATE)
    assert got.pearson <= pearson_at_most
    assert got.tv >= tv_at_least


@pytest.mark.parametrize(
    ("break_it", "pearson_at_most", "tv_at_least"),
    [(drop_log_q, 0.93, 0.14), (drop_weights, 0.9, 0.9), (flip_sign, 0.0, 0.9)],
)
def test_sampled_gate_fails_broken_code(
    monkeypatch: pytest.MonkeyPatch, break_it: Break, pearson_at_most: float, tv_at_least: float
) -> None:
    break_it(monkeypatch)
    got = recover_with_samples(0)
    assert not passes(got, SAMPLED_GATE)
    assert got.pearson <= pearson_at_most
    assert got.tv >= tv_at_least


def test_policy_steps_on_the_true_reward_reach_the_expert_only_with_entropy() -> None:
    assert divergence_after_policy_steps(entropy=True) < 0.005
    assert divergence_after_policy_steps(entropy=False) > 1.0
