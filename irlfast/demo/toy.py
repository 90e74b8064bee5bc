"""The toy language learned by the bi-level trainer: a reward that is known exactly, recovered from 2,000 strings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig

DEMONSTRATIONS = 2000


def toy_config(seed: int = 0) -> BiLevelConfig:
    """Linear reward on the true features, REINFORCE with a leave-one-out baseline on r - log pi."""
    return BiLevelConfig(
        iterations=500,
        prompts_per_step=256,
        regularizer="entropy",
        eval_every=500,
        eval_prompts=256,
        checkpoint_every=500,
        seed=seed,
        rollout=SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=128),
        policy=PolicyConfig(optimizer=OptimizerConfig(lr=0.05, schedule="linear", max_grad_norm=0.0)),
        reward=RewardConfig(optimizer=OptimizerConfig(lr=0.05, schedule="linear", max_grad_norm=0.0)),
    )


def make_toy_trainer(seed: int = 0, config: BiLevelConfig | None = None, out: Path | None = None) -> BiLevelTrainer:
    """A trainer on the toy language: tabular policy, linear reward on the true features, entropy regularised."""
    config = toy_config(seed) if config is None else replace(config, seed=seed)
    torch.manual_seed(seed)
    strings = toy.all_strings()
    drawn = toy.sample_strings(DEMONSTRATIONS + config.eval_prompts, seed=seed).tolist()
    rows = [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=strings[i], truncated=False) for i in drawn]
    policy = toy.ToyPolicy()
    # AIRL's reward holds -log Z as well; to the others a constant term would mean nothing.
    level = config.reward.objective == "airl"
    reward = RewardModel(RewardModelConfig(hidden_size=toy.NUM_FEATURES, hidden_sizes=(), pooling="last", bias=level))
    return BiLevelTrainer(
        policy=policy,
        engine=TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD),
        reward=reward,
        demonstrations=rows[:DEMONSTRATIONS],
        heldout=rows[DEMONSTRATIONS:],
        config=config,
        pad_token_id=toy.PAD,
        out=out,
        features=toy.ToyFeatures(),
    )


@torch.no_grad()
def toy_recovery(trainer: BiLevelTrainer) -> toy.RewardRecovery:
    """Compare the trainer's learned reward with the truth over all 121 strings."""
    input_ids = toy.all_input_ids()
    real = input_ids != toy.PAD
    learned = trainer.reward(toy.ToyFeatures()(input_ids, real), real)
    return toy.reward_recovery(learned, beta=trainer.config.beta)
