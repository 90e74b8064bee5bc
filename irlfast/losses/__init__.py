"""Objectives for policies and rewards. Each returns its loss to minimise and a dict of detached 0-d metrics."""

from irlfast.losses.advantages import group_advantages, shaped_rewards, whiten
from irlfast.losses.maxent import MaxEntropyIRLObjective
from irlfast.losses.objective import Objective, RewardBatch, TokenTerms
from irlfast.losses.policy import PolicyLoss, PolicyMetrics, policy_loss
from irlfast.losses.registry import make_objective, objective_names, register_objective
from irlfast.losses.reward import RewardLoss, maxent_irl_loss
from irlfast.losses.rl import RLLoss, compute_rl_loss, response_logprobs
from irlfast.ops.gae import Gae, gae

__all__ = [
    "Gae",
    "MaxEntropyIRLObjective",
    "Objective",
    "PolicyLoss",
    "PolicyMetrics",
    "RLLoss",
    "RewardBatch",
    "RewardLoss",
    "TokenTerms",
    "compute_rl_loss",
    "gae",
    "group_advantages",
    "make_objective",
    "maxent_irl_loss",
    "objective_names",
    "policy_loss",
    "register_objective",
    "response_logprobs",
    "shaped_rewards",
    "whiten",
]
