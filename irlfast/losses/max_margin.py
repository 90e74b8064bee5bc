"""Max-margin inverse RL on pairs, with d = r_chosen - r_rejected:

    ng_russell   mean_p [ -d where d > 0, else -2 d ]            parameters projected on the unit ball after each step
    hinge        mean_p relu(margin - d) + l2 |theta|^2

Ng and Russell 2000, "Algorithms for inverse reinforcement learning", section 5: the penalty p(x) = x for x >= 0, 2 x
below, under bounded parameters. Without the projection its value has no lower bound. The hinge is the soft-margin form
of Ratliff, Bagnell and Zinkevich 2006. The projection method of Abbeel and Ng is in apprenticeship.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ._rewards import check_option
from .objective import RewardBatch
from .pairwise import PairwiseObjective, checked_pairs, pair_metrics
from .reward import RewardLoss


def max_margin_loss(
    chosen: Tensor,  # (P)
    rejected: Tensor,  # (P)
    *,
    kind: Literal["ng_russell", "hinge"] = "ng_russell",
    margin: float = 1.0,
    l2: float = 0.0,
    parameters: Iterable[Tensor] = (),
) -> RewardLoss:
    """Max-margin loss of pairs.

    Args:
        chosen, rejected: [P] rewards of the better and the worse of each pair.
        kind: "ng_russell", to be followed by `project_on_ball` after each optimiser step, or "hinge".
        margin: what the hinge asks of d, positive.
        l2: weight of |theta|^2, hinge only.
        parameters: theta.

    Returns:
        RewardLoss(loss, metrics): chosen_reward, rejected_reward, margin (mean d), accuracy (share of d > 0),
        max_abs_reward.

    Raises:
        TypeError, ValueError: shapes, values or options that do not fit.
    """
    _check(kind, margin, l2)
    chosen, rejected = checked_pairs(chosen, rejected)
    difference = chosen - rejected
    if kind == "ng_russell":
        loss = torch.where(difference > 0, -difference, -2 * difference).mean()
    else:
        loss = torch.relu(margin - difference).mean()
    if l2:
        theta = list(parameters)
        if not theta:
            raise ValueError(f"l2 is {l2} and parameters is empty: give the reward model's parameters")
        loss = loss + l2 * torch.stack([p.square().sum() for p in theta]).sum()
    return RewardLoss(loss, pair_metrics(chosen, rejected))


def _check(kind: str, margin: float, l2: float) -> None:
    if kind == "abbeel_ng":
        raise ValueError("kind 'abbeel_ng' has no loss: use irlfast.losses.AbbeelNgProjection on feature expectations")
    check_option(kind in ("ng_russell", "hinge"), "kind", kind, "'ng_russell' or 'hinge'")
    check_option(margin > 0, "margin", margin, "a number above 0")
    check_option(l2 >= 0 and (kind == "hinge" or l2 == 0), "l2", l2, "a weight of at least 0, used by the hinge alone")


@torch.no_grad()
def project_on_ball(module: nn.Module, radius: float = 1.0) -> float:
    """Scale the trained parameters of a module, as one vector, back to a norm of at most `radius`; returns their norm
    before."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in parameters])))
    if norm > radius:
        for parameter in parameters:
            parameter.mul_(radius / norm)
    return norm


@dataclass(frozen=True, kw_only=True)
class MaxMarginObjective(PairwiseObjective):
    """Max margin: `losses.max_margin_loss`.

    Args:
        kind: "ng_russell" or "hinge".
        margin, l2: of the hinge.
        radius: of the ball that ng_russell projects the reward model's parameters on after each step. It is the
            reward's scale: a policy with beta = 1 hardly follows a reward whose parameters have norm 1.
    """

    kind: Literal["ng_russell", "hinge"] = "ng_russell"
    margin: float = 1.0
    l2: float = 0.0
    radius: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kind, self.margin, self.l2)
        check_option(self.radius > 0, "radius", self.radius, "a number above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"parameters"} if self.l2 else ())

    def pair_loss(self, chosen: Tensor, rejected: Tensor, batch: RewardBatch) -> RewardLoss:
        return max_margin_loss(
            chosen, rejected, kind=self.kind, margin=self.margin, l2=self.l2, parameters=batch.parameters
        )

    def after_step(self, reward_model: nn.Module) -> None:
        if self.kind == "ng_russell":
            project_on_ball(reward_model, self.radius)
