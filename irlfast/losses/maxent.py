"""The maximum-entropy objective as a trainer uses it; `maxent_irl_loss` in reward.py is the mathematics.

Demonstrations can join the samples that estimate Z (Finn, Levine and Abbeel 2016, section 4.2: without any sample of
theirs, a high-reward region that the policy never visits is missing from Z). The union of E demonstrations and K
samples of a prompt comes from the mixture (E p_E + K q) / (E + K). Nobody knows p_E; its estimate is the model itself,
b exp(r / beta) / Z_hat with Z_hat from the samples alone, which is right where learning ends. That is one step of the
iteration of bridge sampling (Meng and Wong 1996, "Simulating ratios of normalizing constants", equation 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irlfast.ops import importance_weights

from ._rewards import check_option, prompts_of
from .discriminator import check_smoothing
from .objective import Objective, RewardBatch
from .reward import RewardLoss, maxent_irl_loss


@dataclass(frozen=True, kw_only=True)
class MaxEntropyIRLObjective(Objective):
    """Maximum-entropy IRL with self-normalised importance weights: `losses.maxent_irl_loss`.

    Args:
        weight_clip: bound on the log importance weight around its group's mean; None is no bound.
        weight_temper: exponent of the importance weights.
        centre: weight of E[r^2].
        label_smoothing: share of the target that goes from a demonstration to its prompt's samples.
        fuse_demonstrations: let demonstrations join the samples that estimate Z, under the mixture density.
    """

    weight_clip: float | None = None
    weight_temper: float = 1.0
    centre: float = 0.0
    label_smoothing: float = 0.0
    fuse_demonstrations: bool = False

    def __post_init__(self) -> None:
        check_option(
            self.weight_clip is None or self.weight_clip > 0, "weight_clip", self.weight_clip, "above 0, or None"
        )
        check_option(self.weight_temper > 0, "weight_temper", self.weight_temper, "a number above 0")
        check_option(self.centre >= 0, "centre", self.centre, "a number of at least 0")
        check_smoothing(self.label_smoothing)

    @property
    def needs(self) -> frozenset[str]:
        fused = {"expert_logprobs", "expert_log_base"} if self.fuse_demonstrations else set()
        return frozenset({"log_proposal", "log_base", *fused})

    @property
    def takes_replay(self) -> bool:
        return not self.fuse_demonstrations  # the mixture density is known for one sampler

    def loss(self, batch: RewardBatch) -> RewardLoss:
        log_proposal = batch.require("log_proposal", "maxent")
        expert_log_proposal = None
        if self.fuse_demonstrations:
            log_proposal, expert_log_proposal = mixture_density(batch)
        return maxent_irl_loss(
            batch.expert_rewards,
            batch.sample_rewards,
            log_proposal,
            log_base=batch.log_base,
            expert_groups=batch.expert_groups,
            sample_groups=batch.sample_groups,
            beta=batch.beta,
            clip=self.weight_clip,
            temper=self.weight_temper,
            centre=self.centre,
            label_smoothing=self.label_smoothing,
            expert_log_proposal=expert_log_proposal,
            expert_log_base=batch.expert_log_base if self.fuse_demonstrations else None,
        )


@torch.no_grad()
def mixture_density(batch: RewardBatch) -> tuple[Tensor, Tensor]:
    """log (E p_E + K q) / (E + K) at the samples [K] and the demonstrations [E] of each prompt, p_E from the model."""
    log_proposal = batch.require("log_proposal", "maxent")
    expert_logprobs = batch.require("expert_logprobs", "maxent with fuse_demonstrations")
    prompts, expert_index = prompts_of(
        batch.expert_rewards, batch.sample_rewards, batch.expert_groups, batch.sample_groups
    )
    log_model = batch.sample_rewards / batch.beta
    expert_log_model = batch.expert_rewards / batch.beta
    if batch.log_base is not None:
        log_model = log_model + batch.log_base
        expert_log_model = expert_log_model + batch.require("expert_log_base", "maxent with log_base")
    log_z = importance_weights(log_model, log_proposal, groups=prompts.index).log_normalizer
    experts = torch.bincount(expert_index, minlength=len(prompts.ids))
    share = experts / (experts + prompts.counts)

    def mix(log_q: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        part = share[index]
        return torch.logaddexp(log_q + torch.log1p(-part), log_p - log_z[index] + torch.log(part))

    return mix(log_proposal, log_model, prompts.index), mix(expert_logprobs, expert_log_model, expert_index)
