"""Trainers: bi-level inverse RL, IQ-Learn, reward extraction, tuning on a given reward, supervised fine-tuning."""

from irlfast.losses import MaxEntropyIRLObjective, register_objective

from .bilevel import BiLevelTrainer
from .config import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig
from .extraction import ExtractionConfig, ExtractionTrainer
from .iq_config import IQLearnConfig
from .iq_learn import IQLearnTrainer
from .irl_trainer import IRLTrainer
from .optimizer_loop import BiLevelOptimizer, BiLevelTrainingLoop, integrate_with_rollout, setup_bi_level_irl
from .supervised import SupervisedConfig, SupervisedResult, train_supervised
from .trajectories import ExpertLoader, load_expert_demonstrations
from .tuning import TuningConfig, TuningTrainer

__all__ = [
    "BiLevelConfig",
    "BiLevelOptimizer",
    "BiLevelTrainer",
    "BiLevelTrainingLoop",
    "ExpertLoader",
    "ExtractionConfig",
    "ExtractionTrainer",
    "IQLearnConfig",
    "IQLearnTrainer",
    "IRLTrainer",
    "MaxEntropyIRLObjective",
    "OptimizerConfig",
    "PolicyConfig",
    "RewardConfig",
    "SupervisedConfig",
    "SupervisedResult",
    "TuningConfig",
    "TuningTrainer",
    "integrate_with_rollout",
    "load_expert_demonstrations",
    "register_objective",
    "setup_bi_level_irl",
    "train_supervised",
]
