"""Rewards from preferences: P(chosen beats rejected) = sigma(r_chosen - r_rejected) (Bradley and Terry 1952).

    L = mean_p [ -log sigma(r_c - r_r - margin) ] + c mean_p (r_c + r_r)^2

Only differences are learned; the centring term (Eisenstein et al. 2023, arXiv 2312.09244) settles the level.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._rewards import check_option
from .discriminator import check_smoothing, smoothed_loss
from .objective import RewardBatch
from .pairwise import PairwiseObjective, checked_pairs, pair_metrics
from .reward import RewardLoss


def bradley_terry_loss(
    chosen: Tensor,  # (P)
    rejected: Tensor,  # (P)
    *,
    margin: float | Tensor = 0.0,
    centre: float = 0.0,
    label_smoothing: float = 0.0,
) -> RewardLoss:
    """Negative log-likelihood of preferences, per pair, in nats.

    Args:
        chosen, rejected: [P] rewards of the preferred and the other of each pair.
        margin: how much better the chosen one is known to be: a number, or one a pair [P].
        centre: c.
        label_smoothing: share of pairs whose preference is taken to be the other way round.

    Returns:
        RewardLoss(loss, metrics): chosen_reward, rejected_reward, margin (mean difference), accuracy (share of pairs
        with r_chosen > r_rejected), max_abs_reward.

    Raises:
        TypeError, ValueError: shapes, values or options that do not fit.
    """
    check_option(centre >= 0, "centre", centre, "a number of at least 0")
    check_smoothing(label_smoothing)
    chosen, rejected = checked_pairs(chosen, rejected)
    if isinstance(margin, Tensor) and margin.shape not in ((), chosen.shape):
        raise ValueError(
            f"margin has shape {tuple(margin.shape)}; expected one number, or one a pair, {tuple(chosen.shape)}"
        )
    loss = smoothed_loss(chosen - rejected - margin, label_smoothing).mean()
    if centre:
        loss = loss + centre * (chosen + rejected).square().mean()
    return RewardLoss(loss, pair_metrics(chosen, rejected))


@dataclass(frozen=True, kw_only=True)
class BradleyTerryObjective(PairwiseObjective):
    """Bradley-Terry, demonstrations preferred to samples: `losses.bradley_terry_loss`.

    Args:
        margin: how much better a demonstration is known to be.
        centre: weight of (r_c + r_r)^2.
        label_smoothing: share of pairs whose preference is taken to be the other way round.
    """

    margin: float = 0.0
    centre: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_option(self.centre >= 0, "centre", self.centre, "a number of at least 0")
        check_smoothing(self.label_smoothing)

    def pair_loss(self, chosen: Tensor, rejected: Tensor, batch: RewardBatch) -> RewardLoss:
        return bradley_terry_loss(
            chosen, rejected, margin=self.margin, centre=self.centre, label_smoothing=self.label_smoothing
        )
