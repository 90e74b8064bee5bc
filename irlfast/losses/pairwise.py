"""What the losses on pairs (chosen, rejected) share.

In bi-level IRL a pair is a demonstration and a sample of its prompt, every one with every other; elsewhere it is
whatever somebody preferred. Only the difference d = r_chosen - r_rejected counts, so accuracy compares the two, never
each with 0.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from irlfast.ops._segments import compute_dtype

from ._rewards import check_beside, check_rewards
from .objective import Objective, RewardBatch
from .reward import RewardLoss


def checked_pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Both [P], in the type the loss is computed in. TypeError, ValueError: they do not fit, or are not finite."""
    check_rewards(chosen=chosen, rejected=rejected)
    check_beside("rejected", rejected, "chosen", chosen)
    dtype = compute_dtype(chosen, rejected)
    return chosen.to(dtype), rejected.to(dtype)


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """chosen_reward, rejected_reward, margin (means), accuracy (share of pairs with r_chosen > r_rejected; a tie is
    lost), max_abs_reward."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).to(chosen.dtype).mean(),
        "max_abs_reward": chosen.abs().max().maximum(rejected.abs().max()),
    }


@dataclass(frozen=True, kw_only=True)
class PairwiseObjective(Objective):
    """Base of the objectives on pairs: every demonstration with every sample of its prompt."""

    pairwise = True

    @property
    def takes_replay(self) -> bool:
        return True

    @abstractmethod
    def pair_loss(self, chosen: Tensor, rejected: Tensor, batch: RewardBatch) -> RewardLoss:
        """The loss of pairs [P]."""

    def loss(self, batch: RewardBatch) -> RewardLoss:
        loss, metrics = self.pair_loss(*batch.pairs(), batch)
        return RewardLoss(loss, {**batch.summary(), "accuracy": metrics["accuracy"]})
