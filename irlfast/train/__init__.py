"""Trainers: bi-level inverse RL, IQ-Learn, and supervised fine-tuning beside them."""

from irlfast.losses import MaxEntropyIRLObjective, register_objective

from .bilevel import BiLevelTrainer
from .config import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig
from .iq_config import IQLearnConfig
from .iq_learn import IQLearnTrainer
from .supervised import SupervisedConfig, SupervisedResult, train_supervised

__all__ = [
    "BiLevelConfig",
    "BiLevelTrainer",
    "IQLearnConfig",
    "IQLearnTrainer",
    "MaxEntropyIRLObjective",
    "OptimizerConfig",
    "PolicyConfig",
    "RewardConfig",
    "SupervisedConfig",
    "SupervisedResult",
    "register_objective",
    "train_supervised",
]
