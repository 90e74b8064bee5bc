"""The reward's side of bi-level IRL: one optimiser step on demonstrations and samples of their prompts.

    loss = objective(rewards, log-probs, prompts) + gradient_penalty E[(|grad f| - 1)^2] + r1 E_expert[|grad f|^2] / 2

A reward model with several members takes the mean of their losses, each on its own rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from irlfast.losses import RewardBatch, TokenTerms, gradient_penalty, r1_penalty
from irlfast.rewards import BaseRewardModel, TrajectoryRewardModel
from irlfast.rewards.head import PooledRewardModel
from irlfast.rollout import Sequences

from .config import BiLevelConfig
from .experience import Experience, Scored
from .metrics import mean_rows
from .optim import Optimizer
from .scoring import sequence_sum
from .shaping import ShapingPotential

_FEATURES = {"expert_features", "sample_features", "score"}


class Replayed(NamedTuple):
    """Samples of earlier policies: groups as in the experience they join, log_proposal [N] of their own samplers."""

    sequences: Sequences
    scored: Scored
    log_proposal: Tensor


class RewardUpdate:
    """Takes reward steps.

    Args:
        reward: what is trained.
        config: the run's; `config.reward` is the update's own.
        reduce_gradients: called between backward and step with the parameters that are trained; where several processes
            each see a part of the rows, it averages their gradients.

    Raises:
        ValueError: an option that this reward model cannot serve.
    """

    def __init__(
        self,
        reward: BaseRewardModel,
        config: BiLevelConfig,
        *,
        reduce_gradients: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        options = config.reward
        self.reward = reward
        self.config = config
        self._reduce_gradients = reduce_gradients
        self.objective = options.make_objective()
        self._reads_features = bool(options.gradient_penalty or options.r1 or _FEATURES & self.objective.needs)
        if self._reads_features and not isinstance(reward, PooledRewardModel):
            raise ValueError(
                f"reward.gradient_penalty, reward.r1 and objectives that need {sorted(_FEATURES)} take a reward on "
                f"pooled features, and {type(reward).__name__} is none: use the reward model 'mlp' or 'backbone'"
            )
        total = config.reward_warmup_steps + config.iterations * config.reward_steps
        self.shaping: ShapingPotential | None = None
        trained: nn.Module = reward
        if "expert_tokens" in self.objective.needs:
            self.shaping = ShapingPotential(_width_of_states(reward)).to(next(reward.parameters()).device)
            trained = nn.ModuleList([reward, self.shaping])
        self.optimizer = Optimizer(trained, options.optimizer, total)

    def step(self, experience: Experience, expert_scored: Scored, replayed: Replayed | None = None) -> dict[str, float]:
        """One optimiser step; returns loss, the objective's metrics, the penalties that are on, grad_norm and lr."""
        self.reward.train()
        self.optimizer.zero_grad()
        batches = self._batches(experience, expert_scored, replayed)
        results = [self.objective.loss(batch) for batch in batches]
        loss = torch.stack([result.loss for result in results]).mean() if len(results) > 1 else results[0].loss
        metrics = mean_rows([{key: float(value) for key, value in result.metrics.items()} for result in results])
        for name, (weight, value) in self._penalties(batches[0]).items():
            loss = loss + weight * value
            metrics[name] = float(value.detach())
        loss.backward()
        if self._reduce_gradients is not None:
            self._reduce_gradients(self.optimizer.parameters)
        norm, lr = self.optimizer.step()
        self.objective.after_step(self.reward)
        self.reward.eval()
        return {"loss": float(loss.detach()), **metrics, "grad_norm": norm, "lr": lr}

    def _batches(self, experience: Experience, expert_scored: Scored, replayed: Replayed | None) -> list[RewardBatch]:
        """A batch for each member: rewards as they are now, with gradient, and what the objective may ask for."""
        samples, experts, scored = experience.samples, experience.experts, experience.scored
        expert_rewards = self.reward.members(*expert_scored.inputs)
        sample_rewards = self.reward.members(*scored.inputs)
        sample_groups, log_base = samples.groups, scored.log_base
        log_proposal = sequence_sum(samples.sampler_logprobs, samples)
        sample_logprobs: Tensor | None = sequence_sum(samples.model_logprobs, samples)
        if replayed is not None:
            sample_rewards = torch.cat([sample_rewards, self.reward.members(*replayed.scored.inputs)], dim=1)
            sample_groups = torch.cat([sample_groups, replayed.sequences.groups])
            log_base = torch.cat([log_base, replayed.scored.log_base])
            log_proposal = torch.cat([log_proposal, replayed.log_proposal.to(log_proposal)])
            sample_logprobs = None  # no one policy drew them all
        shared = RewardBatch(
            expert_rewards=expert_rewards[0],
            sample_rewards=sample_rewards[0],
            expert_groups=experts.groups,
            sample_groups=sample_groups,
            log_proposal=log_proposal,
            log_base=log_base,
            expert_log_base=expert_scored.log_base,
            expert_logprobs=experience.expert_logprobs,
            sample_logprobs=sample_logprobs,
            parameters=tuple(self.reward.parameters()),
            beta=self.config.beta,
        )
        if self.shaping is not None:
            expert_logprobs = experience.expert_token_logprobs
            if expert_logprobs is None:
                raise ValueError("airl with form='token' needs the experience's expert_token_logprobs: fill it in")
            shared = replace(
                shared,
                expert_tokens=self._token_terms(experts, expert_scored, expert_logprobs),
                sample_tokens=self._token_terms(samples, scored, samples.model_logprobs),
            )
        if self._reads_features:
            shared = self._with_features(shared, expert_scored, scored, replayed)
        others = zip(expert_rewards[1:], sample_rewards[1:], strict=True)
        return [shared, *(replace(shared, expert_rewards=e, sample_rewards=s) for e, s in others)]

    def _token_terms(self, sequences: Sequences, scored: Scored, logprobs: Tensor) -> TokenTerms:
        """The model p ~ b exp(f / beta) token by token: its logit is g / beta + log b - log pi, shaped."""
        assert self.shaping is not None
        states, mask = scored.inputs[:2]
        return TokenTerms(
            rewards=self.reward.token_terms(*scored.inputs) / self.config.beta,
            mask=sequences.response_mask,
            logprobs=logprobs - scored.base_logprobs,
            potentials=self.shaping(states, mask),
        )

    def _with_features(
        self, batch: RewardBatch, expert: Scored, sample: Scored, replayed: Replayed | None
    ) -> RewardBatch:
        """The batch with pooled features of its rows, and the reward as a function of them."""
        reward = self.reward
        assert isinstance(reward, PooledRewardModel)
        parts = [sample] if replayed is None else [sample, replayed.scored]
        return replace(
            batch,
            expert_features=reward.features(*expert.inputs),
            sample_features=torch.cat([reward.features(*part.inputs) for part in parts]),
            score=reward.head,
        )

    def _penalties(self, batch: RewardBatch) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each penalty that is on."""
        options = self.config.reward
        found: dict[str, tuple[float, Tensor]] = {}
        if batch.score is None or batch.expert_features is None or batch.sample_features is None:
            return found
        if options.gradient_penalty:
            value = gradient_penalty(batch.score, batch.expert_features, batch.sample_features)
            found["gradient_penalty"] = (options.gradient_penalty, value)
        if options.r1:
            found["r1"] = (options.r1, r1_penalty(batch.score, batch.expert_features))
        return found


def _width_of_states(reward: BaseRewardModel) -> int:
    """H of the hidden states that a reward with token terms reads. ValueError: it has none."""
    if isinstance(reward, TrajectoryRewardModel) and reward.config.reduction == "sum":
        return reward.config.hidden_size
    raise ValueError(
        f"objective 'airl' with form = 'token' needs a reward that is a sum over tokens, and {type(reward).__name__} "
        "is none: use the reward model 'trajectory' with reduction = 'sum'"
    )
