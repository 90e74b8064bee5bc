"""Differentiable statistics of token distributions and sequences. Each op is defined by its `X_reference`."""

from irlfast.ops.gae import Gae, gae
from irlfast.ops.gather_head import gather_head
from irlfast.ops.importance import ImportanceWeights, importance_weights
from irlfast.ops.kl_estimate import kl_estimate
from irlfast.ops.linear_policy_ref_stats import (
    PolicyRefStats,
    linear_policy_ref_stats,
    linear_policy_ref_stats_reference,
)
from irlfast.ops.linear_token_loss import linear_token_loss
from irlfast.ops.linear_token_stats import linear_token_stats, linear_token_stats_reference
from irlfast.ops.policy_terms import PolicyTerms, policy_terms
from irlfast.ops.sequence import sequence_logprobs
from irlfast.ops.token_kl import token_kl, token_kl_reference
from irlfast.ops.token_stats import TokenStats, token_logprobs, token_stats, token_stats_reference

__all__ = [
    "Gae",
    "ImportanceWeights",
    "PolicyRefStats",
    "PolicyTerms",
    "TokenStats",
    "gae",
    "gather_head",
    "importance_weights",
    "kl_estimate",
    "linear_policy_ref_stats",
    "linear_policy_ref_stats_reference",
    "linear_token_loss",
    "linear_token_stats",
    "linear_token_stats_reference",
    "policy_terms",
    "sequence_logprobs",
    "token_kl",
    "token_kl_reference",
    "token_logprobs",
    "token_stats",
    "token_stats_reference",
]
