"""Self-play fine-tuning, SPIN (Chen et al. 2024, arXiv 2401.01335).

The main player tells demonstrations from the opponent's answers, equation 4.1 with pairs of one prompt:

    L = mean_p l(f(x, y) - f(x, y')),    l logistic log(1 + e^-t), hinge max(0, 1 - t) or exponential e^-t

and the opponent maximises E[f] - scale KL(p || p_t), p_t the opponent before. Its optimum makes
f = scale (log p - log p_t), so the main player may be the language model itself: `spin_loss`. In the trainer f is the
reward model, and the policy's step keeps its KL to the fixed reference, not to the policy one round before: a
departure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._rewards import check_beside, check_option
from .objective import RewardBatch
from .pairwise import PairwiseObjective, checked_pairs, pair_metrics
from .reward import RewardLoss

Link = Literal["logistic", "hinge", "exponential"]
LINKS: tuple[Link, ...] = ("logistic", "hinge", "exponential")


def _linked(difference: Tensor, link: Link) -> Tensor:
    if link == "logistic":
        return -logsigmoid(difference)
    return torch.relu(1 - difference) if link == "hinge" else torch.exp(-difference)


def spin_loss(
    expert_logprobs: Tensor,  # (P)
    sample_logprobs: Tensor,  # (P)
    expert_old_logprobs: Tensor,  # (P)
    sample_old_logprobs: Tensor,  # (P)
    *,
    scale: float = 0.1,
    link: Link = "logistic",
) -> RewardLoss:
    """SPIN with the language model as the main player; equation 4.7.

    Args:
        expert_logprobs, sample_logprobs: [P] log p(y|x) of demonstrations and of the opponent's answers to the same
            prompts under the model that is trained, with gradient.
        expert_old_logprobs, sample_old_logprobs: [P] the same under the opponent, the model one round before.
        scale: the paper's lambda, positive.
        link: l.

    Returns:
        RewardLoss(loss, metrics): as `bradley_terry_loss`, of the rewards scale (log p - log p_t).

    Raises:
        TypeError, ValueError: shapes, values or options that do not fit.
    """
    check_option(scale > 0, "scale", scale, "a number above 0")
    check_option(link in LINKS, "link", link, f"one of {LINKS}")
    check_beside("expert_old_logprobs", expert_old_logprobs, "expert_logprobs", expert_logprobs)
    check_beside("sample_old_logprobs", sample_old_logprobs, "sample_logprobs", sample_logprobs)
    chosen, rejected = checked_pairs(
        scale * (expert_logprobs - expert_old_logprobs.detach()),
        scale * (sample_logprobs - sample_old_logprobs.detach()),
    )
    return RewardLoss(_linked(chosen - rejected, link).mean(), pair_metrics(chosen, rejected))


@dataclass(frozen=True, kw_only=True)
class SpinObjective(PairwiseObjective):
    """SPIN's main player as a reward model.

    Args:
        link: "logistic", "hinge" or "exponential".
    """

    link: Link = "logistic"

    def __post_init__(self) -> None:
        check_option(self.link in LINKS, "link", self.link, f"one of {LINKS}")

    def pair_loss(self, chosen: Tensor, rejected: Tensor, batch: RewardBatch) -> RewardLoss:
        chosen, rejected = checked_pairs(chosen, rejected)
        return RewardLoss(_linked(chosen - rejected, self.link).mean(), pair_metrics(chosen, rejected))
