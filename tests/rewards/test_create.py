from argparse import Namespace
from dataclasses import dataclass

import pytest

from irlfast.rewards import (
    EnsembleRewardModel,
    MultiRewardModel,
    RewardModel,
    TrajectoryRewardModel,
    create_reward_model,
)


@dataclass
class Arguments:
    hidden_size: int = 12
    pooling: str = "mean"
    learning_rate: float = 1e-3  # not the reward model's


@pytest.mark.parametrize(
    "args",
    [
        {"hidden_size": 12, "pooling": "mean"},
        Namespace(hidden_size=12, pooling="mean", steps=5),
        Arguments(),
    ],
)
def test_options_come_from_a_mapping_a_namespace_or_a_dataclass(args):
    model = create_reward_model(args)
    assert isinstance(model, RewardModel)
    assert (model.config.hidden_size, model.config.pooling) == (12, "mean")


def test_each_name_makes_its_class():
    head = {"hidden_size": 8}
    assert isinstance(create_reward_model(head, "mlp"), RewardModel)
    assert isinstance(create_reward_model(head, "trajectory"), TrajectoryRewardModel)
    assert isinstance(create_reward_model({"parts": [{"name": "a", "options": head}]}, "multi"), MultiRewardModel)
    assert isinstance(create_reward_model({"options": head}, "ensemble"), EnsembleRewardModel)


def test_errors_name_what_is_known():
    with pytest.raises(ValueError, match=r"'linear' is no kind of reward model, expected one of \('mlp', 'trajectory'"):
        create_reward_model({}, "linear")
    with pytest.raises(ValueError, match=r"'mlp' needs hidden_size; unknown fields \['poling'\]"):
        create_reward_model({"hidden_size": 3, "poling": "mean"})
    with pytest.raises(ValueError, match="needs hidden_size"):
        create_reward_model(Namespace(pooling="mean"))
