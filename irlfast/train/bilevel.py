"""Bi-level inverse reinforcement learning: a reward learned from demonstrations while the policy is trained on it.

The model of the demonstrator is p(y|x) ~ b(y|x) exp(r(x, y) / beta), b the reference policy or uniform: maximum-entropy
IRL (Ziebart et al. 2008) and, with samples of the policy as importance proposals, guided cost learning (Finn et al.
2016, arXiv 1603.00448). Each iteration takes `policy_steps` steps of

    policy:  maximise E_pi[r] - beta KL(pi || b)          REINFORCE or PPO on whole responses, leave-one-out baseline
    return   R_i = r(y_i) - beta (log pi(y_i) - log b(y_i)),   one number a response, detached

and then `reward_steps` steps of

    reward:  minimise mean_x [ -r(x, y_E) / beta + log (1/K) sum_k exp(r_k / beta) b_k / q_k ]

over demonstrations y_E and samples y_k of the same prompt, q_k the probability the sampler really gave y_k.

Departures from the papers: responses are one action each (no reward per token); the reward reads the last hidden states
of a frozen model, so that it does not move when the policy does; the reward loss uses the rollouts of the policy steps
before it (their q_k is recorded, so the weights are exact) and samples afresh only where there are not enough of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration
from irlfast.losses import RewardBatch, group_advantages, policy_loss
from irlfast.rewards import BaseRewardModel, ReaderConfig, read
from irlfast.rollout import RolloutEngine, Rollouts, Sequences

from . import state
from .config import BiLevelConfig
from .evaluation import SampleMetrics, evaluate_policy
from .log import Progress, RunLog
from .optim import Optimizer
from .scoring import response_scores, sequence_sum
from .seeds import EndlessDraws, derive_seed, permutation

FeatureFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the frozen models say of sequences: the reward's positional inputs (irlfast.rewards), log b(y|x) [B]."""

    inputs: tuple[Tensor, ...]
    log_base: Tensor


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Demonstrations and the policy's own answers to the same prompts; equal prompts are one group.

    expert_logprobs [E]: log pi(y|x) of the demonstrations under the policy that sampled, where the objective asks.
    """

    experts: Sequences
    samples: Rollouts
    scored: Scored
    expert_logprobs: Tensor | None = None


class BiLevelTrainer:
    """Trains a reward and a policy together, evaluates on held-out demonstrations, logs, checkpoints and resumes.

    Args:
        policy: causal LM, called as model(input_ids=, attention_mask=, use_cache=), its output has `.logits` [B, S, V].
        engine: samples from the policy.
        reward: any reward model of irlfast.rewards.
        demonstrations: what the reward is learned from; their prompts are the policy's prompts.
        heldout: demonstrations for evaluation only.
        config: see BiLevelConfig.
        pad_token_id: fills the right of shorter rows.
        out: folder for metrics.jsonl and checkpoints/; None keeps nothing on disk.
        reference: frozen causal LM. Required by regularizer="kl" (it is the base b), and by a reward on hidden states
            where `features` is None.
        features: (input_ids, attention_mask) -> [B, S, H], what a reward on hidden states reads; None: the reference's,
            as `reward.source` says, by default the last layer's.
        sample_metrics: further metrics of the evaluation's samples.
        extra_state: writes further files of every checkpoint (a tokenizer's, for instance), given the folder of its
            policy.

    Raises:
        ValueError: no demonstrations or held-out rows, or a reference that is needed and missing.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        engine: RolloutEngine,
        reward: BaseRewardModel,
        demonstrations: Sequence[TokenizedDemonstration],
        heldout: Sequence[TokenizedDemonstration],
        config: BiLevelConfig,
        pad_token_id: int,
        out: Path | None = None,
        reference: nn.Module | None = None,
        features: FeatureFunction | None = None,
        sample_metrics: SampleMetrics | None = None,
        extra_state: Callable[[Path], None] | None = None,
    ) -> None:
        if not heldout:
            raise ValueError("no held-out demonstrations: keep at least one row apart, or nothing can be evaluated")
        reads_states = features is None and reward.reads == "hidden_states"
        if reference is None and (config.regularizer == "kl" or reads_states):
            need = "regularizer='kl'" if config.regularizer == "kl" else "features=None"
            raise ValueError(f"{need} needs a reference model: pass reference=, a frozen copy of the initial policy")
        if reference is policy:
            raise ValueError("reference is the policy itself: pass a frozen copy, or the KL is 0 whatever is learned")
        self.policy = policy
        self.engine = engine
        self.reward = reward
        if reads_states:
            _set_source(reward, reference, config)
        self.heldout = list(heldout)[: config.eval_prompts]
        self.config = config
        self.objective = config.reward.make_objective()
        self.pad_token_id = pad_token_id
        self.out = out
        self.reference = reference.requires_grad_(False).eval() if reference is not None else None
        self._features = features
        self._sample_metrics = sample_metrics
        self._extra_state = extra_state
        self.draws = EndlessDraws(list(demonstrations), config.seed, "demonstrations")
        self.data_digest = _digest([*demonstrations, *self.heldout])
        self.rollout_count = 0
        self.iteration = 0
        policy_updates = config.iterations * config.policy_steps * config.policy.epochs * config.policy.minibatches
        reward_updates = config.reward_warmup_steps + config.iterations * config.reward_steps
        self.policy_optimizer = Optimizer(policy, config.policy.optimizer, policy_updates)
        self.reward_optimizer = Optimizer(reward, config.reward.optimizer, reward_updates)
        self._resumed = False

    @torch.no_grad()
    def fit_reward_scale(self) -> None:
        """Standardise the reward's features on demonstrations and samples of their prompts; call it before `train`."""
        gathered = self._gather()
        inputs = [gathered.scored.inputs, self._score(gathered.experts).inputs]
        self.reward.fit_feature_scale(*map(_stack, *inputs))

    # The loop

    def train(self) -> dict[str, float]:
        """Run to `config.iterations`, from the start or from where `resume` left off; returns the last evaluation."""
        if self.out is None:
            return self._run(None)
        with RunLog(self.out / "metrics.jsonl", resume_from=self.iteration if self._resumed else None) as log:
            return self._run(log)

    def _run(self, log: RunLog | None) -> dict[str, float]:
        config = self.config
        last: dict[str, float] = {}
        with Progress(config.iterations, "bilevel") as progress:
            if not self._resumed:
                self._warm_up(log)
                last = self._evaluate(log, progress)
                self._checkpoint()
            while self.iteration < config.iterations:
                values = self._iterate()
                self.iteration += 1
                if log is not None:
                    log.write("train", self.iteration, values)
                progress.advance_to(self.iteration, {k: values[k] for k in ("reward/auc", "policy/kl") if k in values})
                done = self.iteration == config.iterations
                if done or self.iteration % config.eval_every == 0:
                    last = self._evaluate(log, progress)
                if done or self.iteration % config.checkpoint_every == 0:
                    self._checkpoint()
        return last or self.evaluate()

    def _iterate(self) -> dict[str, float]:
        """`policy_steps` policy steps, then `reward_steps` reward steps; the mean of each metric over its steps."""
        experience: list[Experience] = []
        policy_rows, reward_rows = [], []
        for _ in range(self.config.policy_steps):
            gathered = self._gather()
            policy_rows.append(self.policy_step(gathered))
            experience.append(gathered)
        for step in range(self.config.reward_steps):
            gathered = experience[step] if step < len(experience) else self._gather()
            reward_rows.append(self.reward_step(gathered))
        return {**_means("policy", policy_rows), **_means("reward", reward_rows)}

    def _warm_up(self, log: RunLog | None) -> None:
        rows = [self.reward_step(self._gather()) for _ in range(self.config.reward_warmup_steps)]
        if rows and log is not None:
            log.write("warmup", 0, _means("reward", rows[-10:]))

    # Steps

    def _gather(self) -> Experience:
        """Draw demonstrations and sample the policy on their prompts."""
        drawn = self.draws.draw(self.config.prompts_per_step)
        groups: dict[tuple[int, ...], int] = {}
        for row in drawn:
            groups.setdefault(tuple(row.prompt_ids), len(groups))
        prompts = [list(prompt) for prompt in groups]
        params = replace(self.config.rollout, seed=derive_seed(self.config.seed, "rollout", self.rollout_count))
        self.rollout_count += 1
        samples = self.engine.generate(prompts, params)
        experts = Sequences.from_token_lists(
            [list(row.prompt_ids) for row in drawn],
            [list(row.response_ids) for row in drawn],
            self.pad_token_id,
            [groups[tuple(row.prompt_ids)] for row in drawn],
        ).to(samples.input_ids.device)
        return Experience(
            experts=experts,
            samples=samples,
            scored=self._score(samples),
            expert_logprobs=self._expert_logprobs(experts) if "expert_logprobs" in self.objective.needs else None,
        )

    def policy_step(self, experience: Experience) -> dict[str, float]:
        """One policy step on fresh rollouts: `epochs` x `minibatches` optimiser steps."""
        config, samples = self.config, experience.samples
        if config.policy.kind == "ppo":
            # Decoding rounds differently from a pass over whole rows; against this pass the ratio starts at exactly 1.
            samples = replace(samples, model_logprobs=self._policy_logprobs(samples))
        log_q = sequence_sum(samples.sampler_logprobs, samples)
        log_ratio = sequence_sum(samples.model_logprobs, samples) - experience.scored.log_base
        # Serving rescales the reward by 1 / scale; beta is rescaled with it, so that the optimum stays where it is.
        served = self.reward.serve(*experience.scored.inputs, update=True)
        beta = config.beta / self.reward.normalizer.scale
        returns = served - beta * log_ratio
        advantages = group_advantages(returns, samples.groups, kind=config.policy.advantage)
        rows: list[dict[str, float]] = []
        for epoch in range(config.policy.epochs):
            order = list(range(len(samples)))
            if config.policy.minibatches > 1:
                counter = self.rollout_count * config.policy.epochs + epoch
                order = permutation(len(samples), config.seed, "minibatches", counter)
            parts = _deal(order, config.policy.minibatches)
            rows.extend(self._policy_update(samples.select(part), advantages[part]) for part in parts)
        self.engine.update_weights(None, self.policy_optimizer.step_count)
        metrics = _mean_rows(rows)
        metrics["return"] = float(returns.mean())
        metrics["reward_served"] = float(served.mean())
        metrics["kl" if config.regularizer == "kl" else "log_prob"] = float(log_ratio.mean())
        metrics["sampler_logprob"] = float(log_q.mean())
        metrics["length"] = float(samples.response_lengths.float().mean())
        return metrics

    def _policy_update(self, rollouts: Rollouts, advantages: Tensor) -> dict[str, float]:
        """One optimiser step over the given rows, in micro-batches that add up to the same gradient."""
        config = self.config.policy
        self.policy.eval()  # dropout would score another policy than the one that sampled
        self.policy_optimizer.zero_grad()
        rows, sizes = [], []
        for low in range(0, len(rollouts), config.micro_batch_size):
            part = slice(low, low + config.micro_batch_size)
            batch = rollouts.select(part).trim()
            stats = response_scores(self.policy, batch).stats
            result = policy_loss(
                stats.logprob,
                advantages[part],
                batch.response_mask,
                kind=config.kind,
                old_logprobs=batch.model_logprobs if config.kind == "ppo" else None,
                rollout_logprobs=batch.sampler_logprobs,
                tis_cap=config.tis_cap,
                entropy=stats.entropy,
                clip=config.clip,
                aggregation="seq_mean_token_sum",
            )
            (result.loss * (len(batch) / len(rollouts))).backward()
            rows.append({"loss": float(result.loss.detach()), **{k: float(v) for k, v in result.metrics.items()}})
            sizes.append(len(batch))
        norm, lr = self.policy_optimizer.step()
        return {**_mean_rows(rows, sizes), "grad_norm": norm, "lr": lr}

    @torch.no_grad()
    def _policy_logprobs(self, samples: Rollouts) -> Tensor:
        """Log-probs [B, S] of the samples as the policy update computes them, in its micro-batches."""
        self.policy.eval()
        size = self.config.policy.micro_batch_size
        parts = [samples.select(slice(low, low + size)) for low in range(0, len(samples), size)]
        return torch.cat([response_scores(self.policy, part).stats.logprob.float() for part in parts])

    def reward_step(self, experience: Experience) -> dict[str, float]:
        """One optimiser step of the reward on demonstrations and samples of their prompts."""
        expert_scored = self._score(experience.experts)
        self.reward.train()
        self.reward_optimizer.zero_grad()
        result = self.objective.loss(self._reward_batch(experience, expert_scored))
        result.loss.backward()
        norm, lr = self.reward_optimizer.step()
        self.objective.after_step(self.reward)
        self.reward.eval()
        metrics = {key: float(value) for key, value in result.metrics.items()}
        return {"loss": float(result.loss.detach()), **metrics, "grad_norm": norm, "lr": lr}

    def _reward_batch(self, experience: Experience, expert_scored: Scored) -> RewardBatch:
        """Rewards as they are now, with gradient, and what the objective may ask for beside them."""
        samples, experts, scored = experience.samples, experience.experts, experience.scored
        return RewardBatch(
            expert_rewards=self.reward(*expert_scored.inputs),
            sample_rewards=self.reward(*scored.inputs),
            expert_groups=experts.groups,
            sample_groups=samples.groups,
            log_proposal=sequence_sum(samples.sampler_logprobs, samples),
            log_base=scored.log_base,
            expert_log_base=expert_scored.log_base,
            expert_logprobs=experience.expert_logprobs,
            sample_logprobs=sequence_sum(samples.model_logprobs, samples),
            parameters=tuple(self.reward.parameters()),
            beta=self.config.beta,
        )

    @torch.no_grad()
    def _expert_logprobs(self, experts: Sequences) -> Tensor:
        """log pi(y|x) [E] of demonstrations under the policy as it is."""
        self.policy.eval()
        size = self.config.policy.micro_batch_size
        parts = [experts.select(slice(low, low + size)) for low in range(0, len(experts), size)]
        return torch.cat([sequence_sum(response_scores(self.policy, part).stats.logprob, part) for part in parts])

    @torch.no_grad()
    def _score(self, sequences: Sequences) -> Scored:
        """What the reward reads of sequences, and their base log-prob, in micro-batches."""
        size = self.config.reward.micro_batch_size
        states, log_base = [], []
        for low in range(0, len(sequences), size):
            part = sequences.select(slice(low, low + size))
            if self._features is not None:
                states.append(self._features(part.input_ids, part.attention_mask))
            elif self.reward.source is not None and self.reference is not None:
                reading = read(
                    self.reference, part.input_ids, part.attention_mask, part.response_mask, self.reward.source
                )
                states.append(reading.hidden_states)
                log_base.append(sequence_sum(reading.stats.logprob, part))
                continue
            if self.reference is not None:
                log_base.append(sequence_sum(response_scores(self.reference, part).stats.logprob, part))
        if self.reward.reads == "tokens":
            inputs = (sequences.input_ids, sequences.attention_mask, sequences.response_mask)
        else:
            inputs = (torch.cat(states), sequences.response_mask, sequences.attention_mask)
        base = torch.cat(log_base) if self.config.regularizer == "kl" else torch.zeros(len(sequences))
        return Scored(inputs=inputs, log_base=base.to(sequences.input_ids.device))

    # Evaluation, checkpoints

    def rewards(self, sequences: Sequences) -> Tensor:
        """Raw learned reward of each sequence: [B], no gradient."""
        with torch.no_grad():
            return self.reward(*self._score(sequences).inputs)

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the policy and the reward as they are (see evaluate_policy)."""
        return evaluate_policy(
            policy=self.policy,
            engine=self.engine,
            heldout=self.heldout,
            sampling=self.config.rollout,
            pad_token_id=self.pad_token_id,
            seed=derive_seed(self.config.seed, "evaluation", 0),
            reward=self.rewards,
            reference=self.reference,
            sample_metrics=self._sample_metrics,
        )

    def _evaluate(self, log: RunLog | None, progress: Progress) -> dict[str, float]:
        metrics = self.evaluate()
        if log is not None:
            log.write("eval", self.iteration, metrics)
        shown = {k: v for k, v in metrics.items() if not k.startswith("expert_") or k == "expert_token_logprob"}
        progress.note(f"iteration {self.iteration}", shown)
        return metrics

    def _checkpoint(self) -> None:
        if self.out is not None:
            state.save(self, self.out / "checkpoints", self._extra_state)

    def resume(self) -> int:
        """Take everything from the newest checkpoint under `out`; returns its iteration.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another configuration.
        """
        if self.out is None:
            raise ValueError("out is None: a trainer without a folder has no checkpoint to resume from")
        state.load(self, self.out / "checkpoints")
        self._resumed = True
        return self.iteration


def _set_source(reward: BaseRewardModel, reference: Any, config: BiLevelConfig) -> None:
    """Let the reward know what it reads, which is saved with it; or check that it knows."""
    statistics = config.reward.token_statistics
    if reward.source is None:
        name = getattr(getattr(reference, "config", None), "name_or_path", "")
        reward.source = ReaderConfig(model=name, token_statistics=statistics)
    elif reward.source.token_statistics != statistics:
        raise ValueError(
            f"reward.token_statistics is {statistics}, the reward model was made with {reward.source}: let both agree"
        )


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Two batches [B, S, ...] below one another, zeros to the right of the narrower one."""
    width = max(first.shape[1], second.shape[1])
    parts = []
    for part in (first, second):
        fill = part.new_zeros(part.shape[0], width - part.shape[1], *part.shape[2:])
        parts.append(torch.cat([part, fill], dim=1))
    return torch.cat(parts)


def _deal(order: list[int], parts: int) -> list[list[int]]:
    """Cut `order` into `parts` runs whose lengths differ by at most one; fewer only where there are fewer items."""
    bounds = [len(order) * i // parts for i in range(parts + 1)]
    return [order[low:high] for low, high in pairwise(bounds) if high > low]


def _mean_rows(rows: Sequence[Mapping[str, float]], weights: Sequence[int] | None = None) -> dict[str, float]:
    """Each metric over `rows`: its extreme where its name says _min or _max, else its mean.

    `weights` are the sizes of the batches that the rows speak of, by default all equal.
    """
    if not rows:
        return {}
    weights = [1] * len(rows) if weights is None else weights
    total = sum(weights)

    def combine(key: str) -> float:
        values = [row[key] for row in rows]
        if key.endswith("_min"):
            return min(values)
        if key.endswith("_max"):
            return max(values)
        return sum(w * value for w, value in zip(weights, values, strict=True)) / total

    return {key: combine(key) for key in rows[0]}


def _means(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {f"{prefix}/{key}": value for key, value in _mean_rows(rows).items()}


def _digest(rows: Sequence[TokenizedDemonstration]) -> str:
    """Tells one set of demonstrations, in its order, from another."""
    text = "\n".join(f"{list(row.prompt_ids)} {list(row.response_ids)}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
