"""RL fine-tuning with a given reward: the bi-level trainer without its reward steps, watched by a second reward.

    maximise E_pi[r] - beta KL(pi || start)

A learned reward is right where its data were. A policy that goes on climbing it leaves that region: the learned reward
still rises, the true one falls (Gao, Schulman and Hilton 2023, "Scaling laws for reward model overoptimization", arXiv
2210.10760). Where a true reward is at hand it is evaluated beside the learned one, and the run can stop at that point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from irlfast.rewards import TextRewardModel
from irlfast.rollout import Rollouts, SamplingParams, Sequences

from .bilevel import BiLevelTrainer
from .config import BiLevelConfig, OptimizerConfig, PolicyConfig, require
from .evaluation import SampleMetrics
from .log import Progress, RunLog, read_log
from .monitors import MonitorConfig


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """One tuning run."""

    iterations: int = 100
    """Policy steps, each on fresh samples."""
    prompts_per_step: int = 32
    """Prompts drawn for a step."""
    beta: float = 0.1
    """Weight of the KL to the start, in units of the raw reward."""
    eval_every: int = 10
    """Iterations between evaluations on the held-out prompts."""
    eval_prompts: int = 128
    """Held-out prompts of an evaluation."""
    checkpoint_every: int = 20
    """Iterations between checkpoints; the last is always written."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    stop_patience: int = 0
    """Stop after so many evaluations in a row in which the learned reward stood above, and the true reward below, what
    they were when the true one was best, by more than two standard errors; 0 never stops. Needs a true reward."""
    seed: int = 0
    """Seed of every random draw."""
    rollout: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64, n=8))
    """How the policy is sampled; its `n` is the group size."""
    policy: PolicyConfig = field(
        default_factory=lambda: PolicyConfig(
            kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=10)
        )
    )
    """Policy update."""

    def __post_init__(self) -> None:
        require(self.stop_patience >= 0, "stop_patience", self.stop_patience, "a count of at least 0")
        self.bilevel()

    def bilevel(self) -> BiLevelConfig:
        """The same as a bi-level run that takes no reward step."""
        return BiLevelConfig(
            iterations=self.iterations,
            policy_steps=1,
            reward_steps=0,
            prompts_per_step=self.prompts_per_step,
            beta=self.beta,
            regularizer="kl",
            eval_every=self.eval_every,
            eval_prompts=self.eval_prompts,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            seed=self.seed,
            rollout=self.rollout,
            policy=self.policy,
            # The reward was not learned from these demonstrations: whether it tells them from samples says nothing.
            monitors=MonitorConfig(auc_blind=0.0, auc_perfect=1.0),
        )


class Overoptimization:
    """Watches two rewards of the same samples for the point where they part.

    Args:
        patience: evaluations in a row after which `stopped` is true; 0 never.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.parted = 0
        self._best: tuple[float, float] | None = None

    def update(self, learned: float, true: float, true_error: float) -> bool:
        """Take in an evaluation; returns whether the rewards have parted in it.

        Args:
            learned, true: mean rewards of the samples. true_error: standard error of the second.
        """
        if self._best is None or true >= self._best[1]:
            self._best = (learned, true)
        parted = learned > self._best[0] and true < self._best[1] - 2 * true_error
        self.parted = self.parted + 1 if parted else 0
        return parted

    @property
    def stopped(self) -> bool:
        return 0 < self.patience <= self.parted


class TuningTrainer(BiLevelTrainer):
    """A BiLevelTrainer whose reward is given and stays as it is.

    Args:
        config: a TuningConfig.
        true_reward: evaluated beside the reward: metrics true_reward and true_reward_error, its standard error.
        arguments: as for BiLevelTrainer; the demonstrations' prompts are what is answered, and their responses are only
            compared with.

    Raises:
        ValueError: stop_patience without a true reward.
    """

    def __init__(self, *, config: TuningConfig, true_reward: TextRewardModel | None = None, **arguments: Any) -> None:
        if config.stop_patience and true_reward is None:
            raise ValueError(f"stop_patience = {config.stop_patience} compares with a true reward: give one")
        self._true_reward = true_reward
        self._watch = Overoptimization(config.stop_patience)
        super().__init__(config=config.bilevel(), sample_metrics=self._true_metrics(), **arguments)

    def _true_metrics(self) -> SampleMetrics | None:
        if self._true_reward is None:
            return None
        reward = self._true_reward

        def metrics(samples: Rollouts) -> Mapping[str, float]:
            values = _judge(reward, samples).double()
            return {
                "true_reward": float(values.mean()),
                "true_reward_error": float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0,
            }

        return metrics

    @property
    def stopped_early(self) -> bool:
        """Whether the rewards have parted for `stop_patience` evaluations in a row."""
        return self._watch.stopped

    def _evaluate(self, log: RunLog | None, progress: Progress) -> dict[str, float]:
        metrics = super()._evaluate(log, progress)
        if self._true_reward is not None:
            self._take_in(metrics)
        return metrics

    def _consider_stopping(self, metrics: dict[str, float], log: RunLog | None, progress: Progress) -> None:
        if self.stopped_early:
            shown = {"true_reward": metrics["true_reward"], "reward_sample": metrics["reward_sample"]}
            progress.note(f"stopped at iteration {self.iteration}: the true reward falls, the learned one rises", shown)
            if log is not None:
                log.write("stop", self.iteration, shown)

    def resume(self) -> int:
        """As BiLevelTrainer.resume; what the rewards did so far is read from metrics.jsonl."""
        iteration = super().resume()
        assert self.out is not None
        self._watch = Overoptimization(self._watch.patience)
        if self._true_reward is not None:
            for row in read_log(self.out / "metrics.jsonl", "eval"):
                if row["iteration"] <= iteration:
                    self._take_in(row)
        return iteration

    def _take_in(self, row: Mapping[str, float]) -> None:
        self._watch.update(row["reward_sample"], row["true_reward"], row["true_reward_error"])


def _judge(reward: TextRewardModel, sequences: Sequences) -> Any:
    return reward(sequences.input_ids, sequences.attention_mask, sequences.response_mask)
