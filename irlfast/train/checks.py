"""What a trainer is not to be begun with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from irlfast.data import TokenizedDemonstration
from irlfast.losses import Objective

from .config import BiLevelConfig


def check_dense_rewards(config: BiLevelConfig, objective: Objective) -> None:
    """ValueError where tokens cannot be given their share of what the policy is trained on."""
    rewards = torch.tensor([-2.0, 0.0, 3.0])
    if config.policy.dense_rewards and not torch.equal(objective.policy_reward(rewards), rewards):
        raise ValueError(
            f"policy.dense_rewards with objective {config.reward.objective!r} and options {config.reward.options}: "
            "what the policy is given is made of whole responses' rewards; use an objective whose policy reward is the "
            "learned one (for gail the option policy_reward_kind = 'logit')"
        )


def check_ends(rows: Sequence[TokenizedDemonstration], eos_token_ids: Sequence[int] | None) -> None:
    """ValueError where a demonstration that was not cut lacks the EOS that rollouts end with."""
    if eos_token_ids is None:  # an engine that does not say
        return
    for i, row in enumerate(rows):
        if not row.truncated and row.response_ids[-1] not in eos_token_ids:
            raise ValueError(
                f"demonstration {i} ({row.source or 'no source'}) ends with token {row.response_ids[-1]}, not with EOS "
                f"{tuple(eos_token_ids)}: a reward would tell it from rollouts by that alone. End it with EOS, or mark "
                "it truncated where it was cut"
            )
