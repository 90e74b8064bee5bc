"""A reward that learns from demonstrations while a TRL trainer trains the policy on it: bi-level IRL inside TRL.

The trainer calls it once a generation, with the policy as it sampled. It judges the completions, and in training keeps
them with demonstrations of their prompts; after every `update_every` optimiser steps of the policy its callback lets it
learn from what was kept, by the steps of BiLevelTrainer (irlfast.train.reward_update).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration, digest
from irlfast.rewards import BaseRewardModel
from irlfast.rewards.base import evaluating
from irlfast.rollout import Rollouts, Sequences
from irlfast.train.checks import check_ends
from irlfast.train.experience import Experience, Scored
from irlfast.train.metrics import mean_rows
from irlfast.train.replay import Replay
from irlfast.train.reward_update import Replayed, RewardUpdate
from irlfast.train.scorer import FeatureFunction, Scorer, stack
from irlfast.train.scoring import sequence_sum

from . import state
from .callback import OnlineRewardCallback
from .config import OnlineRewardConfig
from .experts import Experts
from .policy import TrainerPolicy
from .ranks import average_gradients, gathered, share
from .text import check_completions


class Generation(NamedTuple):
    """What one call in training leaves to learn from."""

    experience: Experience
    expert_scored: Scored


class OnlineReward:
    """`reward_funcs=reward, callbacks=[reward.callback]` of GRPOTrainer or RLOOTrainer.

    Args:
        reward: what is learned; any reward model of irlfast.rewards.
        demonstrations: what it is learned from, for example from `demonstrations_for_trl`.
        reference: frozen causal LM, a copy of the start policy. Needed by a reward on hidden states (unless `features`
            gives them) and by regularizer = "kl".
        features: (input_ids, attention_mask) -> [B, S, H], what a reward on hidden states reads in place of the
            reference's states.
        config: see OnlineRewardConfig.
        name: what the trainer's logs call it.

    Attributes:
        callback: the TrainerCallback without which it cannot be called.
        history: a dict for each update: the trainer's "step" and the metrics that the logs call "irl/...".

    Raises:
        ValueError: no demonstrations, a missing reference, or options that the reward model cannot serve.
    """

    def __init__(
        self,
        reward: BaseRewardModel,
        demonstrations: Sequence[TokenizedDemonstration],
        *,
        reference: nn.Module | None = None,
        features: FeatureFunction | None = None,
        config: OnlineRewardConfig | None = None,
        name: str = "irlfast_reward",
    ) -> None:
        self.__name__ = name
        self.config = config = config or OnlineRewardConfig()
        if not demonstrations:
            raise ValueError("no demonstrations: there is nothing to learn the reward from")
        reads_states = features is None and reward.reads == "hidden_states"
        if reference is None and (reads_states or config.regularizer == "kl"):
            need = "a reward on hidden states" if reads_states else "regularizer = 'kl'"
            raise ValueError(f"{need} needs reference=, a frozen copy of the policy that training starts from")
        bilevel = config.bilevel()
        self.reward = reward.eval()
        self.reference = None if reference is None else reference.requires_grad_(False).eval()
        self.learner = RewardUpdate(reward, bilevel, reduce_gradients=average_gradients)
        self.experts = Experts(
            demonstrations,
            per_prompt=config.demonstrations_per_prompt,
            pooled=config.pairing == "pooled",
            seed=config.seed,
        )
        self.data_digest = digest(demonstrations)
        self.replay = Replay(config.reward.replay, pad_token_id=0)
        self.kept: deque[Generation] = deque(maxlen=config.update_steps)
        self.fitted = not config.fit_feature_scale
        self.trainer_step = 0
        self.unlogged: list[dict[str, float]] = []
        self.history: list[dict[str, float]] = []
        self.callback = OnlineRewardCallback(self)
        self._score = Scorer(reward, self.reference, features, bilevel)
        self._policy: TrainerPolicy | None = None
        self._loaded: int | None = None

    # The trainer's side, told by the callback

    def bind(self, model: Any, tokenizer: Any, args: Any) -> None:
        """Whose completions are judged.

        Raises:
            TypeError, ValueError: see TrainerPolicy; or demonstrations that do not end as its completions do.
        """
        self._policy = TrainerPolicy(
            model, tokenizer, args, self.learner.objective, micro_batch_size=self.config.reward.micro_batch_size
        )
        check_ends(self.experts.rows, self._policy.eos_token_ids)
        self.replay.pad_token_id = self._policy.pad_token_id
        for module in (self.reward, self.reference, self.learner.shaping):
            if module is not None:
                module.to(self._policy.device)

    def begin(self, step: int, max_steps: int, folder: Path) -> None:
        """Training begins: at `step`, above 0 where it resumes, and then with what was saved in `folder`.

        Raises:
            FileNotFoundError, ValueError: as `load`; or what was loaded is from another step.
        """
        self.learner.optimizer.total_steps = math.ceil(max_steps / self.config.update_every) * self.config.update_steps
        if self._loaded is None and step:
            self.load(folder)
        if self._loaded is not None and step and self._loaded != step:
            raise ValueError(f"the reward was loaded from step {self._loaded}, the trainer resumes at step {step}")
        self._loaded, self.trainer_step = None, step
        share(self.reward, *([] if self.learner.shaping is None else [self.learner.shaping]))

    def end_step(self, step: int) -> None:
        """The trainer has taken `step` optimiser steps: learn where it is time to."""
        self.trainer_step = step
        if step % self.config.update_every == 0:
            self.update()

    def save(self, folder: str | Path) -> None:
        """Write the whole state (irlfast.integrations.trl.state); the callback does so in each checkpoint."""
        state.save(self, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote; only needed for a checkpoint that is not in the trainer's output_dir.

        Raises:
            RuntimeError: there is no trainer yet, so nobody knows on which device.
            FileNotFoundError, DamagedCheckpointError, ValueError: see irlfast.integrations.trl.state.
        """
        if self._policy is None:
            raise RuntimeError(
                "load the reward after the trainer was made with callbacks=[reward.callback], before train()"
            )
        self._loaded = state.load(self, Path(folder))

    # Judging

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        trainer_state: Any = None,
        log_metric: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward for each completion, never None; in training, what is to be learned from is kept.

        Raises:
            RuntimeError: the trainer has no `callbacks=[reward.callback]`.
            ValueError: completions that cannot be judged, a prompt without demonstrations, or log-probs that the
                objective reads and that are not known.
        """
        policy = self._policy
        if policy is None:
            raise RuntimeError(
                f"{self.__name__} does not know its trainer: pass callbacks=[reward.callback] beside reward_funcs"
            )
        ids = check_completions(prompts, completions, completion_ids)
        pooled = self.config.pairing == "pooled"
        samples = policy.samples(prompts, ids, pooled=pooled, given=columns.get("sampler_logprobs"))
        if not policy.training:
            return self._served(self._score(samples), update=False)
        experts = self.experts.draw(samples, prompts, policy.pad_token_id)
        generation = self.keep(samples, experts, policy.of_demonstrations(experts))
        if log_metric is not None:
            for name, value in mean_rows(self.unlogged).items():
                log_metric(name, value)
            self.unlogged = []
        if trainer_state is not None and trainer_state.global_step < self.config.warmup_steps:
            return [0.0] * len(samples)
        return self._served(generation.experience.scored, update=True)

    @torch.no_grad()
    def _served(self, scored: Scored, *, update: bool) -> list[float | None]:
        with evaluating(self.reward):
            rewards = self.reward(*scored.inputs)
        if update:
            self.reward.normalizer.update(gathered(rewards))
        given = self.learner.objective.policy_reward(rewards)
        served = given if self.config.serve == "raw" else self.reward.normalizer.normalize(given)
        values: list[float | None] = served.tolist()
        return values

    # Learning

    def keep(self, samples: Rollouts, experts: Sequences, expert_logprobs: Tensor | None) -> Generation:
        """Keep a generation to learn from, with what the frozen models say of it."""
        scored, expert_scored = self._score(samples), self._score(experts)
        if not self.fitted:
            self.reward.fit_feature_scale(*map(stack, scored.inputs, expert_scored.inputs))
            share(self.reward)
            self.fitted = True
        experience = Experience(
            experts=experts,
            samples=samples,
            scored=scored,
            expert_logprobs=None if expert_logprobs is None else sequence_sum(expert_logprobs, experts),
            expert_token_logprobs=expert_logprobs,
        )
        generation = Generation(experience, expert_scored)
        self.kept.append(generation)
        return generation

    def update(self) -> dict[str, float]:
        """Learn from what was kept; in several processes, called by all.

        Returns:
            The means over the reward's steps; {} where no completions came since the last time.
        """
        generations = list(self.kept)
        self.kept.clear()
        if not generations:
            return {}
        rows = [self._learn(generations[i % len(generations)]) for i in range(self.config.update_steps)]
        for generation in generations:
            self.replay.add(generation.experience.samples)
        normalizer = self.reward.normalizer
        named = {f"irl/{name}": value for name, value in mean_rows(rows).items()}
        named |= {"irl/normalizer_mean": float(normalizer.mean), "irl/normalizer_std": float(normalizer.std)}
        self.history.append({"step": self.trainer_step, **named})
        self.unlogged.append(named)
        return named

    def _learn(self, generation: Generation) -> dict[str, float]:
        earlier = self.replay.of(generation.experience.samples)
        replayed = None if earlier is None else Replayed(earlier[0], self._score(earlier[0]), earlier[1])
        return self.learner.step(generation.experience, generation.expert_scored, replayed)
