"""Where the policy is the expert there is nothing to learn: held-out AUC .5, and rewards that stay small.

The earlier system's weights 1 and .1 drove rewards to 2858 there. An MLP with a constant term, 250 steps against
samples of the exact expert.
"""

import warnings
from dataclasses import replace

import pytest
import torch

from irlfast.data import TokenizedDemonstration
from irlfast.demo.toy import toy_config
from irlfast.eval import toy
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import BiLevelTrainer, OptimizerConfig, RewardConfig

MAX_REWARD = 10.0


def learn_nothing(reward: RewardConfig, steps: int = 250) -> tuple[float, float]:
    """Held-out AUC, and the largest |r| over the 121 strings."""
    config = replace(
        toy_config(0),
        iterations=steps,
        policy_steps=0,
        prompts_per_step=48,
        eval_prompts=2000,
        rollout=SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=48),
        reward=replace(reward, optimizer=OptimizerConfig(lr=0.02, max_grad_norm=0.0)),
    )
    torch.manual_seed(0)
    policy = toy.policy_of(toy.expert_log_probs())
    strings = toy.all_strings()
    rows = [
        TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=strings[i], truncated=False)
        for i in toy.sample_strings(4000, seed=0).tolist()
    ]
    trainer = BiLevelTrainer(
        policy=policy,
        engine=TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD),
        reward=RewardModel(RewardModelConfig(hidden_size=toy.NUM_FEATURES, hidden_sizes=(16,))),
        demonstrations=rows[:2000],
        heldout=rows[2000:],
        config=config,
        pad_token_id=toy.PAD,
        features=toy.ToyFeatures(),
    )
    for _ in range(steps):
        trainer.reward_step(trainer._gather())
    ids = toy.all_input_ids()
    with torch.no_grad():
        rewards = trainer.reward(toy.ToyFeatures()(ids), ids != toy.PAD)
    return trainer.evaluate()["reward_auc"], float(rewards.abs().max())


@pytest.mark.parametrize("objective", ["maxent", "airl", "gail"])
def test_expert_is_policy(objective: str) -> None:
    auc, largest = learn_nothing(RewardConfig(objective=objective))
    assert auc == pytest.approx(0.5, abs=0.03)
    # Max-ent and AIRL learn log p_E itself, down to -8.6 with AIRL's level; GAIL what is left between the two sides.
    assert largest < MAX_REWARD


def test_bug_of_the_bilevel_system_weights_1_and_a_tenth_drive_rewards_away() -> None:
    with pytest.warns(UserWarning, match="not shift-invariant"):
        reward = RewardConfig(objective="weighted", options={"reward_weight": 1.0, "policy_weight": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, largest = learn_nothing(reward)
    assert largest > 100 * MAX_REWARD
