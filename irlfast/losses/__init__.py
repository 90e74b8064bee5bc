"""Objectives for policies and rewards. Each returns its loss to minimise and a dict of detached 0-d metrics."""

from irlfast.losses.advantages import group_advantages, shaped_rewards, whiten
from irlfast.losses.policy import PolicyLoss, PolicyMetrics, policy_loss
from irlfast.losses.reward import RewardLoss, maxent_irl_loss
from irlfast.losses.rl import RLLoss, compute_rl_loss, response_logprobs
from irlfast.ops.gae import Gae, gae

__all__ = [
    "Gae",
    "PolicyLoss",
    "PolicyMetrics",
    "RLLoss",
    "RewardLoss",
    "compute_rl_loss",
    "gae",
    "group_advantages",
    "maxent_irl_loss",
    "policy_loss",
    "response_logprobs",
    "shaped_rewards",
    "whiten",
]
