"""Generative adversarial imitation learning (Ho and Ermon 2016, arXiv 1606.03476) on whole responses.

The reward model is the logit f of D = sigma(f), "demonstration or sample"; its optimum is log p_E - log pi, a
comparison with the policy as it is and no reward that outlives it (f is 0 everywhere once pi = p_E). The policy
maximises one of

    softplus      -log sigma(-f) = -log (1 - D)     at least 0; nearly flat where samples are recognised
    logit         f = log D - log (1 - D)           the log-ratio itself
    logsigmoid    log sigma(f) = log D              at most 0; nearly flat where samples pass

Each is increasing in f. With the trainer's regulariser of weight beta and the logit, the policy ends at
pi ~ b^(beta/(1+beta)) p_E^(1/(1+beta)): the smaller beta, the closer to the demonstrator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import logsigmoid

from ._rewards import check_option, check_rewards, prompts_of, reward_summary
from .discriminator import check_smoothing, discriminator_loss
from .objective import Objective, RewardBatch
from .reward import RewardLoss

PolicyReward = Literal["softplus", "logit", "logsigmoid"]


def gail_loss(
    expert_logits: Tensor,  # (E)
    sample_logits: Tensor,  # (K)
    *,
    label_smoothing: float = 0.0,
    expert_groups: Tensor | None = None,
    sample_groups: Tensor | None = None,
) -> RewardLoss:
    """Logistic loss of a discriminator between demonstrations and samples: 2 log 2 where it cannot tell them apart.

    Args:
        expert_logits, sample_logits: [E] and [K] the reward model's f.
        label_smoothing: labels are 1 - e and e.
        expert_groups, sample_groups: prompt ids, for the metric auc alone; both or neither.

    Returns:
        RewardLoss(loss, metrics): expert_reward, sample_reward, margin, auc, max_abs_reward (all of f),
        expert_accuracy, sample_accuracy.

    Raises:
        TypeError, ValueError: shapes or values that do not fit (`maxent_irl_loss` has the same checks).
    """
    check_rewards(expert_logits=expert_logits, sample_logits=sample_logits)
    prompts, index = prompts_of(expert_logits, sample_logits, expert_groups, sample_groups)
    loss, accuracies = discriminator_loss(expert_logits, sample_logits, label_smoothing=label_smoothing)
    summary = reward_summary(expert_logits.detach(), sample_logits.detach(), index, prompts)
    return RewardLoss(loss, {**summary, **accuracies})


@dataclass(frozen=True, kw_only=True)
class GailObjective(Objective):
    """GAIL: `losses.gail_loss`, and the policy's reward made of the logit.

    Args:
        policy_reward_kind: "softplus", "logit" or "logsigmoid".
        label_smoothing: labels are 1 - e and e.
    """

    policy_reward_kind: PolicyReward = "softplus"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        kinds = get_args(PolicyReward)
        check_option(self.policy_reward_kind in kinds, "policy_reward_kind", self.policy_reward_kind, f"one of {kinds}")
        check_smoothing(self.label_smoothing)

    @property
    def takes_replay(self) -> bool:
        return True

    def loss(self, batch: RewardBatch) -> RewardLoss:
        return gail_loss(
            batch.expert_rewards,
            batch.sample_rewards,
            label_smoothing=self.label_smoothing,
            expert_groups=batch.expert_groups,
            sample_groups=batch.sample_groups,
        )

    def policy_reward(self, rewards: Tensor) -> Tensor:
        if self.policy_reward_kind == "softplus":
            return -logsigmoid(-rewards)
        return rewards if self.policy_reward_kind == "logit" else logsigmoid(rewards)
