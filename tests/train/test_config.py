"""Configurations check themselves: the error names the option, its value and what was expected."""

import dataclasses
import re
from typing import Any

import pytest

from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig, SupervisedConfig
from irlfast.train.config import config_dict

BAD = [
    (OptimizerConfig, {"lr": 0.0}, "lr = 0.0, expected a number above 0"),
    (OptimizerConfig, {"lr": float("nan")}, "lr = nan"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay = -0.1"),
    (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps = -1"),
    (OptimizerConfig, {"final_lr_fraction": 1.5}, "final_lr_fraction = 1.5, expected a share in [0, 1]"),
    (OptimizerConfig, {"max_grad_norm": -1.0}, "max_grad_norm = -1.0"),
    (PolicyConfig, {"epochs": 0}, "policy.epochs = 0"),
    (PolicyConfig, {"minibatches": 0}, "policy.minibatches = 0"),
    (PolicyConfig, {"micro_batch_size": 0}, "policy.micro_batch_size = 0"),
    (RewardConfig, {"weight_temper": 0.0}, "reward.weight_temper = 0.0"),
    (RewardConfig, {"centre": -1.0}, "reward.centre = -1.0"),
    (RewardConfig, {"micro_batch_size": 0}, "reward.micro_batch_size = 0"),
    (BiLevelConfig, {"iterations": -1}, "iterations = -1"),
    (BiLevelConfig, {"policy_steps": -1}, "policy_steps = -1"),
    (BiLevelConfig, {"reward_steps": -1}, "reward_steps = -1"),
    (BiLevelConfig, {"reward_warmup_steps": -1}, "reward_warmup_steps = -1"),
    (BiLevelConfig, {"prompts_per_step": 0}, "prompts_per_step = 0"),
    (BiLevelConfig, {"beta": 0.0}, "beta = 0.0, expected a number above 0: without it the reward is not identifiable"),
    (BiLevelConfig, {"eval_every": 0}, "eval_every = 0"),
    (BiLevelConfig, {"eval_prompts": 0}, "eval_prompts = 0"),
    (BiLevelConfig, {"checkpoint_every": 0}, "checkpoint_every = 0"),
    (BiLevelConfig, {"keep_checkpoints": 0}, "keep_checkpoints = 0"),
    (BiLevelConfig, {"rollout": SamplingParams(n=1)}, "rollout.n = 1, expected at least 2"),
    (BiLevelConfig, {"rollout": SamplingParams(n=2, temperature=0.0)}, "rollout.temperature = 0.0, expected above 0"),
    (SupervisedConfig, {"steps": -1}, "steps = -1"),
    (SupervisedConfig, {"batch_size": 0}, "batch_size = 0"),
    (SupervisedConfig, {"eval_every": 0}, "eval_every = 0"),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD)
def test_a_bad_value_is_named(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**values)


@pytest.mark.parametrize("values", [{"epochs": 2}, {"minibatches": 2}])
def test_reinforce_takes_one_step_a_batch(values: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"reinforce takes one step on each batch of rollouts; use policy\.kind = 'ppo'"
    ):
        PolicyConfig(kind="reinforce", **values)
    assert PolicyConfig(kind="ppo", **values) is not None


@pytest.mark.parametrize("kind", [OptimizerConfig, PolicyConfig, RewardConfig, BiLevelConfig, SupervisedConfig])
def test_configurations_are_frozen_and_keyword_only(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(1)
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), name, 1)


def test_config_dict_is_plain_and_whole() -> None:
    values = config_dict(BiLevelConfig(policy=PolicyConfig(optimizer=OptimizerConfig(lr=0.5))))
    assert values["policy"]["optimizer"]["lr"] == 0.5
    assert values["rollout"]["n"] == 8
    assert set(values) == {field.name for field in dataclasses.fields(BiLevelConfig)}
