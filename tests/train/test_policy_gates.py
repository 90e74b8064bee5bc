"""The bi-level gate on the toy language with every policy update: the reward is recovered, the policy is the expert.

Where the policy is free, as the toy's is, no weighting of responses moves the point where all returns are equal
(irlfast.train.policy_kinds), so the kinds of GRPO pass the same gate as RLOO; test_policy_update has the exact gradient
of each kind. Recovery alone could not tell a policy that learns nothing, for importance weights forgive any sampler: so
the policy is gated too.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from irlfast.demo.toy import make_toy_trainer, toy_config, toy_recovery
from irlfast.eval import toy
from irlfast.rollout import SamplingParams
from irlfast.train import OptimizerConfig, PolicyConfig, policy_update
from irlfast.train.config import CriticConfig
from irlfast.train.critic import Critic

OPTIMIZER = OptimizerConfig(lr=0.1, schedule="linear", max_grad_norm=0.0)


def learn(**options: Any) -> tuple[toy.RewardRecovery, float]:
    """Recovery of the reward, and the policy's total variation from the expert, after 200 iterations."""
    base = toy_config()
    config = replace(
        base,
        iterations=200,
        prompts_per_step=128,
        eval_every=200,
        eval_prompts=8,
        rollout=SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=128),
        policy=PolicyConfig(optimizer=OPTIMIZER, **options),
        reward=replace(base.reward, optimizer=OPTIMIZER),
    )
    trainer = make_toy_trainer(0, config)
    trainer.train()
    expert, policy = toy.expert_log_probs().exp(), toy.log_probs(trainer.policy).detach().double().exp()
    return toy_recovery(trainer), 0.5 * float((policy - expert).abs().sum())


def passes(got: toy.RewardRecovery, policy: float) -> bool:
    return got.pearson >= 0.98 and got.tv <= 0.10 and policy <= 0.10


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kind": "ppo", "advantage": "gae", "critic": CriticConfig(lam=0.95)}, id="ppo with a critic"),
        pytest.param({"kind": "grpo"}, id="grpo"),
        pytest.param({"kind": "dapo"}, id="dapo"),
        pytest.param({"kind": "gspo"}, id="gspo"),
        pytest.param({"kind": "rloo", "dense_rewards": True}, id="rloo, dense rewards"),
    ],
)
def test_every_update_recovers_the_reward_and_becomes_the_expert(options: dict[str, Any]) -> None:
    assert passes(*learn(**options))


def without_shaping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's return is the reward alone: no entropy."""
    right = policy_update.shaped_rewards
    monkeypatch.setattr(
        policy_update, "shaped_rewards", lambda *args, beta, **options: right(*args, beta=0.0, **options)
    )


def values_after_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """V_t knows what token t did, so its advantage is taken away."""
    monkeypatch.setattr(Critic, "values", lambda self, states: self.head((states - self.mean) / self.std)[..., 0])


@pytest.mark.parametrize("break_it", [without_shaping, values_after_the_token])
def test_the_gate_fails_broken_critics(monkeypatch: pytest.MonkeyPatch, break_it: Any) -> None:
    break_it(monkeypatch)
    torch.manual_seed(0)
    assert not passes(*learn(kind="ppo", advantage="gae", critic=CriticConfig(lam=0.95)))
