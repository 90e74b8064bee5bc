"""Objectives for policies and rewards. Each returns its loss to minimise and a dict of detached 0-d metrics."""

from irlfast.losses.advantages import group_advantages, whiten
from irlfast.losses.policy import PolicyLoss, policy_loss
from irlfast.losses.reward import RewardLoss, maxent_irl_loss
from irlfast.losses.rl import RLLoss, compute_rl_loss, response_logprobs

__all__ = [
    "PolicyLoss",
    "RLLoss",
    "RewardLoss",
    "compute_rl_loss",
    "group_advantages",
    "maxent_irl_loss",
    "policy_loss",
    "response_logprobs",
    "whiten",
]
