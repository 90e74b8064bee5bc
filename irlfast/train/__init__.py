"""Trainers: bi-level inverse RL, and supervised fine-tuning beside it."""

from irlfast.losses import MaxEntropyIRLObjective, register_objective

from .bilevel import BiLevelTrainer
from .config import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig
from .supervised import SupervisedConfig, SupervisedResult, train_supervised

__all__ = [
    "BiLevelConfig",
    "BiLevelTrainer",
    "MaxEntropyIRLObjective",
    "OptimizerConfig",
    "PolicyConfig",
    "RewardConfig",
    "SupervisedConfig",
    "SupervisedResult",
    "register_objective",
    "train_supervised",
]
