"""The simple form of the maximum-entropy objective, for a policy that keeps up with the reward:

    L = -w_e E_expert[r] + w_p E_policy[r] - w_h H(pi)

With w_e = w_p its gradient is the max-ent likelihood's where the samples come from p ~ b exp(r / beta), and only there:
it has no importance weights. With w_e != w_p it is not shift-invariant: adding c to every reward changes L by (w_p -
w_e) c, so the level runs off for as long as it is trained, even where expert and policy are the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from irlfast.ops._segments import compute_dtype

from ._rewards import check_option
from .objective import Objective, RewardBatch
from .reward import RewardLoss


@dataclass(frozen=True, kw_only=True)
class WeightedObjective(Objective):
    """The difference of mean rewards.

    Args:
        reward_weight: w_e, of the demonstrations.
        policy_weight: w_p, of the policy's samples. Another than reward_weight is warned about when the objective is
            made.
        entropy_weight: w_h, of the policy's entropy, estimated by -E[log pi] over the samples. It shows in the loss;
            its gradient reaches whatever the log-probs came from, which in the trainer is nothing: there beta is the
            weight of the policy's entropy.
        centre: weight of E[r^2], as in `losses.maxent_irl_loss`.
    """

    reward_weight: float = 1.0
    policy_weight: float = 1.0
    entropy_weight: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        for name in ("reward_weight", "policy_weight"):
            check_option(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in ("entropy_weight", "centre"):
            check_option(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        if self.reward_weight != self.policy_weight:
            warnings.warn(
                f"reward_weight = {self.reward_weight} and policy_weight = {self.policy_weight} differ: the loss is "
                "not shift-invariant, and the level of the reward runs off even where expert and policy are the "
                "same. Give both the same value, or use the objective 'maxent'",
                stacklevel=3,
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"sample_logprobs"} if self.entropy_weight else ())

    def loss(self, batch: RewardBatch) -> RewardLoss:
        dtype = compute_dtype(batch.expert_rewards, batch.sample_rewards)
        expert, sample = batch.expert_rewards.to(dtype), batch.sample_rewards.to(dtype)
        loss: Tensor = self.policy_weight * sample.mean() - self.reward_weight * expert.mean()
        if self.entropy_weight:
            loss = loss + self.entropy_weight * batch.require("sample_logprobs", "weighted with entropy_weight").mean()
        if self.centre:
            loss = loss + self.centre * (expert.square().mean() + sample.square().mean()) / 2
        return RewardLoss(loss, batch.summary())
