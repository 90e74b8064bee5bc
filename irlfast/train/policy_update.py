"""The policy's side of bi-level IRL: from samples and their rewards to advantages, and from those to optimiser steps.

Where one number a response is all there is, and no critic,

    R_i = r(y_i) - beta (log pi(y_i) - log b(y_i)),   A_i = group_advantages(R)

With a critic, or rewards given token by token, the same return is spread over the tokens (losses.shaped_rewards),

    r_t = -beta (log pi_t - log b_t) + r(y_i) at the last token      or + the reward model's own r_t,

and A_t is GAE's under the critic, or, without one, the return still to come less that of the prompt's other responses
at the same place, G_it - mean_{j != i} G_jt: a baseline that no action of response i has a part in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from irlfast.losses import gae, group_advantages, policy_loss, shaped_rewards, whiten
from irlfast.rollout import Rollouts

from .config import BiLevelConfig
from .critic import Critic, explained_variance, value_loss
from .experience import Scored
from .metrics import mean_rows
from .mismatch import MismatchWatch, gap_metrics, version_lag
from .optim import Optimizer
from .policy_kinds import RECIPES
from .scoring import response_scores, sequence_sum
from .seeds import permutation

# Samples drawn ahead are some policy steps old; what is done about it where nothing else is asked for.
_OVERLAP_TIS_CAP = 2.0


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What one policy step learns from, row by row as its samples.

    Args:
        advantages: [B], or [B, S], one a token.
        old_values, returns: [B, S], the critic's; both None without one.
    """

    advantages: Tensor
    old_values: Tensor | None = None
    returns: Tensor | None = None


class PolicyUpdate:
    """Takes policy steps: a call of `step` is `epochs` x `minibatches` optimiser steps on one batch of samples.

    Args:
        policy: what is trained, as far as its parameters require a gradient.
        config: the run's; `config.policy` is the update's own.
    """

    def __init__(self, policy: nn.Module, config: BiLevelConfig) -> None:
        self.policy = policy
        self.config = config
        self.recipe = RECIPES[config.policy.kind]
        self.watch = MismatchWatch()
        self.tis_cap = config.policy.tis_cap
        if config.overlap and self.tis_cap is None and config.policy.icepop_band is None:
            self.tis_cap = _OVERLAP_TIS_CAP
        self.aggregation = config.policy.aggregation or self.recipe.aggregation
        total = config.iterations * config.policy_steps * config.policy.epochs * config.policy.minibatches
        self.optimizer = Optimizer(policy, config.policy.optimizer, total)
        self.critic: Critic | None = None
        self.critic_optimizer: Optimizer | None = None
        if config.policy.advantage_kind == "gae":
            self.critic = Critic(policy, config.policy.critic)
            self.critic_optimizer = Optimizer(self.critic, config.policy.critic.optimizer, total)

    def step(
        self, samples: Rollouts, rewards: Tensor, scored: Scored, *, beta: float, counter: int
    ) -> dict[str, float]:
        """One policy step on fresh rollouts.

        Args:
            samples: B responses of the policy.
            rewards: [B] as served; or [B, S], one a token, with `policy.dense_rewards`.
            scored: the reference's log-probs of the samples.
            beta: weight of the KL or entropy, on the scale that the rewards are served on.
            counter: a number of its own for each call, from which minibatches are shuffled.

        Returns:
            Means over the optimiser steps, and of the whole batch: return, reward_served, kl (log_prob where the
            regulariser is the entropy), sampler_logprob, length; before the step, the gap between trainer and sampler
            and the samples' age in versions (irlfast.train.mismatch); explained_variance with a critic; dropped, the
            share of samples left out, for a kind that leaves out.
        """
        options = self.config.policy
        old_values = None
        measured: dict[str, float] = version_lag(samples, self.optimizer.step_count)
        if self._needs_old_pass:
            # Decoding rounds differently from a pass over whole rows; against this pass the ratio starts at exactly 1.
            # Samples drawn ahead are of an earlier policy; the return is that of the one that takes the step.
            old_logprobs, old_values = self._old_pass(samples)
            measured |= gap_metrics(old_logprobs, samples)
            samples = replace(samples, model_logprobs=old_logprobs)
        log_ratio = sequence_sum(samples.model_logprobs, samples) - scored.log_base
        reward = rewards if rewards.dim() == 1 else sequence_sum(rewards, samples)
        returns = reward - beta * log_ratio
        if old_values is None and rewards.dim() == 1:
            advantages = group_advantages(returns, samples.groups, kind=options.advantage_kind)  # type: ignore[arg-type]
            targets = Targets(advantages=advantages)
        else:
            targets = self._token_targets(samples, rewards, scored, old_values, beta)
        kept = self._kept(samples, targets.advantages)
        rows: list[dict[str, float]] = []
        for epoch in range(options.epochs):
            order = kept
            if options.minibatches > 1:
                shuffled = permutation(len(kept), self.config.seed, "minibatches", counter * options.epochs + epoch)
                order = [kept[i] for i in shuffled]
            rows.extend(self._update(samples, targets, part) for part in _deal(order, options.minibatches))
        metrics = mean_rows(rows) | measured
        self.watch.see(metrics)
        metrics["return"] = float(returns.mean())
        metrics["reward_served"] = float(reward.mean())
        metrics["kl" if self.config.regularizer == "kl" else "log_prob"] = float(log_ratio.mean())
        metrics["sampler_logprob"] = float(sequence_sum(samples.sampler_logprobs, samples).mean())
        metrics["length"] = float(samples.response_lengths.float().mean())
        if self.recipe.drops:
            metrics["dropped"] = 1.0 - len(kept) / len(samples)
        if old_values is not None and targets.returns is not None:
            metrics["explained_variance"] = explained_variance(old_values, targets.returns, samples.response_mask)
        return metrics

    def _token_targets(
        self, samples: Rollouts, rewards: Tensor, scored: Scored, old_values: Tensor | None, beta: float
    ) -> Targets:
        """Advantages [B, S] from a return that is spread over the tokens."""
        options, mask = self.config.policy, samples.response_mask
        whole = rewards if rewards.dim() == 1 else torch.zeros_like(rewards[:, 0])
        spread = shaped_rewards(whole, samples.model_logprobs, scored.base_logprobs, mask, beta=beta)
        if rewards.dim() == 2:
            spread = spread + torch.where(mask, rewards, 0.0)
        if old_values is not None:
            advantages, returns = gae(spread, old_values, mask, gamma=1.0, lam=options.critic.lam)
            if options.critic.whiten:
                advantages = whiten(advantages, mask)
            return Targets(advantages=advantages, old_values=old_values, returns=returns)
        to_come = spread.flip(1).cumsum(1).flip(1)
        width = to_come.shape[1]
        # Responses to one prompt begin in one column, so equal columns are equal places in the response.
        places = samples.groups[:, None] * width + torch.arange(width, device=mask.device)
        advantages = group_advantages(
            to_come.flatten(),
            places.flatten(),
            kind=options.advantage_kind,  # type: ignore[arg-type]
        )
        return Targets(advantages=torch.where(mask, advantages.view_as(to_come), 0.0))

    def _kept(self, samples: Rollouts, advantages: Tensor) -> list[int]:
        """Rows to learn from: all, or those of prompts with an advantage. All as well where no prompt has one."""
        every = list(range(len(samples)))
        if not self.recipe.drops:
            return every
        tells = (advantages != 0) if advantages.dim() == 1 else (advantages != 0).any(1)
        informative = torch.isin(samples.groups, samples.groups[tells]).tolist()
        return [row for row in every if informative[row]] or every

    def _update(self, samples: Rollouts, targets: Targets, part: list[int]) -> dict[str, float]:
        """One optimiser step over the given rows, in micro-batches that add up to the same gradient."""
        options = self.config.policy
        self.policy.eval()  # dropout would score another policy than the one that sampled
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        tokens = int(samples.response_mask[part].sum())
        rows, shares = [], []
        for low in range(0, len(part), options.micro_batch_size):
            chosen = part[low : low + options.micro_batch_size]
            batch = samples.select(chosen).trim()
            width = batch.input_ids.shape[1]
            scores = response_scores(self.policy, batch, hidden_states=self._reads_policy)
            result = policy_loss(
                scores.stats.logprob,
                _trimmed(targets.advantages[chosen], width),
                batch.response_mask,
                kind=options.kind,
                old_logprobs=batch.model_logprobs if self.recipe.ratio else None,
                rollout_logprobs=batch.sampler_logprobs,
                tis_cap=self.tis_cap,
                icepop_band=options.icepop_band,
                entropy=scores.stats.entropy,
                clip=options.clip,
                aggregation=self.aggregation,
                denominator=self._constant(len(chosen)),
                # What tells nothing is left out already; what is here counts whole.
                groups=torch.zeros_like(batch.groups) if self.recipe.drops else None,
            )
            own_tokens = int(batch.response_mask.sum())
            share, whole = (own_tokens, tokens) if self.aggregation == "token_mean" else (len(chosen), len(part))
            (result.loss * (share / whole)).backward()
            row = {"loss": float(result.loss.detach()), **{k: float(v) for k, v in result.metrics.items()}}
            if not self._needs_old_pass:  # a first and only step, so these are the log-probs before it
                row |= gap_metrics(scores.stats.logprob, batch)
            if self.critic is not None:
                assert targets.old_values is not None
                assert targets.returns is not None
                values = self.critic.values(self.critic.states(batch, scores.hidden))
                old, goal = (v[chosen, :width] for v in (targets.old_values, targets.returns))
                loss = value_loss(values, old, goal, batch.response_mask, options.critic.clip)
                (loss * (own_tokens / tokens)).backward()
                row["value_loss"] = float(loss.detach())
            rows.append(row)
            shares.append(share)
        norm, lr = self.optimizer.step()
        metrics = {**mean_rows(rows, shares), "grad_norm": norm, "lr": lr}
        if self.critic_optimizer is not None:
            metrics["critic_grad_norm"] = self.critic_optimizer.step()[0]
        return metrics

    @torch.no_grad()
    def _old_pass(self, samples: Rollouts) -> tuple[Tensor, Tensor | None]:
        """Log-probs and values [B, S] of the samples as the update computes them, in its micro-batches."""
        self.policy.eval()
        size = self.config.policy.micro_batch_size
        logprobs, values = [], []
        for low in range(0, len(samples), size):
            part = samples.select(slice(low, low + size))
            scores = response_scores(self.policy, part, hidden_states=self._reads_policy)
            logprobs.append(scores.stats.logprob.float())
            if self.critic is not None:
                states = self.critic.states(part, scores.hidden)
                self.critic.fit_scale(part, states)
                values.append(self.critic.values(states))
        return torch.cat(logprobs), torch.cat(values) if values else None

    @property
    def _needs_old_pass(self) -> bool:
        return self.recipe.ratio or self.critic is not None or self.config.overlap > 0

    @property
    def _reads_policy(self) -> bool:
        return self.critic is not None and self.critic.trunk is None

    def _constant(self, rows: int) -> float | None:
        """The constant that token_sum divides by: as if every response were as long as it may be."""
        return float(rows * self.config.rollout.max_new_tokens) if self.aggregation == "token_sum" else None


def _trimmed(values: Tensor, width: int) -> Tensor:
    return values if values.dim() == 1 else values[:, :width]


def _deal(order: list[int], parts: int) -> list[list[int]]:
    """Cut `order` into `parts` runs whose lengths differ by at most one; fewer only where there are fewer items."""
    bounds = [len(order) * i // parts for i in range(parts + 1)]
    return [order[low:high] for low, high in pairwise(bounds) if high > low]
