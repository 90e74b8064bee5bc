"""TextGAIL's contrastive discriminator (Wu, Li and Yu 2021, arXiv 2004.13796): pick the demonstration out of a line-up.

    L = mean_i [ -log ( exp f(x, y_i) / ( exp f(x, y_i) + sum_k exp f(x, y_k) ) ) ]

over the K samples y_k of y_i's prompt; the paper has K = 1. It compares answers to one prompt with each other, so
nothing that depends on the prompt alone can tell them apart. At its optimum f = log p_E - log pi + c(x) (van den Oord
et al. 2018, arXiv 1807.03748, section 2.3).

Departure: the paper rewards the policy with the softmax share of its sample beside one demonstration. Here it is
    rewarded
with f itself, which orders samples alike, and whose c(x) the baseline of the prompt's group takes away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irlfast.ops._segments import compute_dtype

from ._rewards import check_rewards, prompts_of, reward_summary
from .objective import Objective, RewardBatch
from .reward import RewardLoss


def contrastive_loss(
    expert_rewards: Tensor,  # (E)
    sample_rewards: Tensor,  # (K)
    *,
    expert_groups: Tensor | None = None,
    sample_groups: Tensor | None = None,
) -> RewardLoss:
    """Softmax cross-entropy of each demonstration among the samples of its prompt, in nats.

    Args:
        expert_rewards, sample_rewards: [E] and [K] f of demonstrations and samples.
        expert_groups, sample_groups: prompt ids; both, or neither where there is one prompt.

    Returns:
        RewardLoss(loss, metrics): expert_reward, sample_reward, margin, auc, max_abs_reward, accuracy (share of
        demonstrations above every sample of their prompt).

    Raises:
        TypeError, ValueError: shapes or values that do not fit.
    """
    check_rewards(expert_rewards=expert_rewards, sample_rewards=sample_rewards)
    prompts, index = prompts_of(expert_rewards, sample_rewards, expert_groups, sample_groups)
    dtype = compute_dtype(expert_rewards, sample_rewards)
    expert = expert_rewards.to(dtype)
    others = prompts.logsumexp(sample_rewards)[index]
    loss = (torch.logaddexp(expert.double(), others) - expert).mean().to(dtype)
    best = prompts.max(sample_rewards)[index]
    metrics = {
        **reward_summary(expert.detach(), sample_rewards.detach().to(dtype), index, prompts),
        "accuracy": (expert_rewards.detach() > best).to(dtype).mean(),
    }
    return RewardLoss(loss, metrics)


@dataclass(frozen=True, kw_only=True)
class ContrastiveObjective(Objective):
    """TextGAIL's contrastive form: `losses.contrastive_loss`. It has no options."""

    @property
    def takes_replay(self) -> bool:
        return True

    def loss(self, batch: RewardBatch) -> RewardLoss:
        return contrastive_loss(
            batch.expert_rewards,
            batch.sample_rewards,
            expert_groups=batch.expert_groups,
            sample_groups=batch.sample_groups,
        )
