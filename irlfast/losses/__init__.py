"""Objectives for policies and rewards. Each returns its loss to minimise and a dict of detached 0-d metrics."""

from irlfast.losses.advantages import group_advantages, shaped_rewards, whiten
from irlfast.losses.airl import AirlObjective, airl_loss, airl_token_loss
from irlfast.losses.apprenticeship import AbbeelNgProjection
from irlfast.losses.bradley_terry import BradleyTerryObjective, bradley_terry_loss
from irlfast.losses.contrastive import ContrastiveObjective, contrastive_loss
from irlfast.losses.gail import GailObjective, gail_loss
from irlfast.losses.iq_learn import IQRewards, iq_learn_loss, iq_learn_rewards, linear_iq_learn_loss, sampled_kl
from irlfast.losses.max_margin import MaxMarginObjective, max_margin_loss, project_on_ball
from irlfast.losses.maxent import MaxEntropyIRLObjective
from irlfast.losses.objective import Objective, RewardBatch, TokenTerms
from irlfast.losses.penalties import gradient_penalty, r1_penalty
from irlfast.losses.policy import PolicyLoss, PolicyMetrics, policy_loss
from irlfast.losses.registry import make_objective, objective_names, register_objective
from irlfast.losses.reward import RewardLoss, maxent_irl_loss
from irlfast.losses.rl import RLLoss, compute_rl_loss, response_logprobs
from irlfast.losses.spin import SpinObjective, spin_loss
from irlfast.losses.weighted import WeightedObjective
from irlfast.ops.gae import Gae, gae

__all__ = [
    "AbbeelNgProjection",
    "AirlObjective",
    "BradleyTerryObjective",
    "ContrastiveObjective",
    "Gae",
    "GailObjective",
    "IQRewards",
    "MaxEntropyIRLObjective",
    "MaxMarginObjective",
    "Objective",
    "PolicyLoss",
    "PolicyMetrics",
    "RLLoss",
    "RewardBatch",
    "RewardLoss",
    "SpinObjective",
    "TokenTerms",
    "WeightedObjective",
    "airl_loss",
    "airl_token_loss",
    "bradley_terry_loss",
    "compute_rl_loss",
    "contrastive_loss",
    "gae",
    "gail_loss",
    "gradient_penalty",
    "group_advantages",
    "iq_learn_loss",
    "iq_learn_rewards",
    "linear_iq_learn_loss",
    "make_objective",
    "max_margin_loss",
    "maxent_irl_loss",
    "objective_names",
    "policy_loss",
    "project_on_ball",
    "r1_penalty",
    "register_objective",
    "response_logprobs",
    "sampled_kl",
    "shaped_rewards",
    "spin_loss",
    "whiten",
]
