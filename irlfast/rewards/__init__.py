"""Reward models: hidden states or token ids in, one number for each response out.

What they share, whatever their kind (BaseRewardModel):

    model(*inputs)                    raw rewards [B], for reward losses; model.members(*inputs) [M, B] for an ensemble
    model.serve(*inputs)              normalised by the running statistics, without gradient: what a policy is given
    model.token_rewards(*inputs)      TokenRewards(values [B, S], kind): terms of an additive reward, or an attribution
    model.components(*inputs)         named raw rewards [B] that it is made of, for the log
    model.fit_feature_scale(*inputs)  standardise what it reads
    model.save_pretrained(folder), load_reward_model(folder)     the class comes from the file
    create_reward_model(args, "mlp" | "trajectory" | "multi" | "ensemble" | "backbone")

`inputs` depend on `model.reads`. "hidden_states" is (hidden_states [B, S, H], mask [B, S], context_mask [B, S]): mask
is the response's tokens, context_mask prompt and response. "tokens" is (input_ids, attention_mask, response_mask), each
[B, S]. `reward_inputs` makes the tuple for either, so that a caller writes the same for all of them.
"""

from .backbone import BackboneRewardConfig, BackboneRewardModel
from .base import BaseRewardModel, TokenRewards
from .create import create_reward_model
from .export import ExportError, export_sequence_classifier
from .head import HeadConfig
from .model import RewardModel, RewardModelConfig
from .multi import EnsembleRewardConfig, EnsembleRewardModel, MultiRewardConfig, MultiRewardModel, RewardPart
from .normalizer import RewardNormalizer
from .pooling import pool
from .reader import ReaderConfig, read, reward_inputs
from .storage import load_reward_model, save_reward_model
from .text import TextReward, TextRewardConfig, TextRewardModel, load_text_reward
from .trajectory import TrajectoryRewardConfig, TrajectoryRewardModel

__all__ = [
    "BackboneRewardConfig",
    "BackboneRewardModel",
    "BaseRewardModel",
    "EnsembleRewardConfig",
    "EnsembleRewardModel",
    "ExportError",
    "HeadConfig",
    "MultiRewardConfig",
    "MultiRewardModel",
    "ReaderConfig",
    "RewardModel",
    "RewardModelConfig",
    "RewardNormalizer",
    "RewardPart",
    "TextReward",
    "TextRewardConfig",
    "TextRewardModel",
    "TokenRewards",
    "TrajectoryRewardConfig",
    "TrajectoryRewardModel",
    "create_reward_model",
    "export_sequence_classifier",
    "load_reward_model",
    "load_text_reward",
    "pool",
    "read",
    "reward_inputs",
    "save_reward_model",
]
