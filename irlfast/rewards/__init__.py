"""Reward models: pooled hidden states in, one number for each response out."""

from .model import RewardModel, RewardModelConfig
from .normalizer import RewardNormalizer
from .pooling import pool

__all__ = ["RewardModel", "RewardModelConfig", "RewardNormalizer", "pool"]
