"""Trainers: bi-level inverse RL, and supervised fine-tuning beside it."""

from .bilevel import BiLevelTrainer
from .config import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig
from .supervised import SupervisedConfig, SupervisedResult, train_supervised

__all__ = [
    "BiLevelConfig",
    "BiLevelTrainer",
    "OptimizerConfig",
    "PolicyConfig",
    "RewardConfig",
    "SupervisedConfig",
    "SupervisedResult",
    "train_supervised",
]
