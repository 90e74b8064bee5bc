"""Reward extraction: a reward learned from pairs of answers, on hidden states of a frozen language model.

Reconstructing what a model was tuned for, as in "Insights from the Inverse" (arXiv 2410.12491): answers of the tuned
model are the demonstrations, answers of its base to the same prompts what they are told from. Human preferences are
pairs just as well. The objectives are those of irlfast.losses:

    max_margin, bradley_terry, spin   each pair (chosen, rejected) by itself
    maxent, airl, gail, ...           the chosen answers of a prompt against its rejected ones, whose log-prob under
                                      the base is known: p_tuned ~ base * exp(r / beta)

The language model is frozen and every answer read once, so a step costs a small network's forward and backward alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from irlfast.losses import RewardBatch
from irlfast.losses.objective import Objective
from irlfast.losses.registry import make_objective
from irlfast.rewards.base import evaluating
from irlfast.rewards.head import PooledRewardModel, feature_scale

from .answers import Answers, Pairs
from .config import OptimizerConfig, require
from .optim import Optimizer
from .seeds import permutation


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """Training of one reward on pairs."""

    objective: str = "bradley_terry"
    """What it is learned by: max_margin, bradley_terry, maxent, airl, or another name of irlfast.losses."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """The objective's own options, name and value in turn (docs/objectives.md lists them)."""
    beta: float = 1.0
    """Temperature of the maximum-entropy model."""
    epochs: int = 30
    """Passes over the training pairs at most."""
    batch_size: int = 128
    """Pairs a step."""
    patience: int = 5
    """Passes without a better accuracy on the validation pairs after which training stops; the best one is kept."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01))
    """Optimiser."""
    seed: int = 0
    """Seed of the order of the pairs."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        for name in ("epochs", "batch_size", "patience"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self.make_objective()

    def make_objective(self) -> Objective:
        """The objective. ValueError: an unknown name or option."""
        return make_objective(self.objective, self.options)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass: its mean loss, and the share of training and of validation pairs ranked right (ties half)."""

    epoch: int
    loss: float
    train_accuracy: float
    validation_accuracy: float


class ExtractionTrainer:
    """Trains a reward on pairs, and ends with the weights that ranked the validation pairs best.

    Args:
        reward: a reward on pooled hidden states; its standardisation is fitted on the training answers.
        answers: what the language model read.
        train, validation: pairs, as rows of `answers`. Test pairs have no place here.
        config: see ExtractionConfig.

    Raises:
        ValueError: a split without pairs, features that do not fit the reward, or an objective that estimates a
            normaliser and prompts with a single rejected answer, which cannot bound it.
    """

    def __init__(
        self, reward: PooledRewardModel, answers: Answers, train: Pairs, validation: Pairs, config: ExtractionConfig
    ) -> None:
        for name, pairs in (("train", train), ("validation", validation)):
            if not len(pairs.chosen):
                raise ValueError(f"{name} has no pairs: nothing to {'learn from' if name == 'train' else 'choose by'}")
        if answers.features.shape[1] != reward.feature_mean.shape[0]:
            raise ValueError(
                f"answers have {answers.features.shape[1]} features, the reward reads {reward.feature_mean.shape[0]}: "
                "pool them as the reward's configuration says"
            )
        self.reward = reward
        self.config = config
        self.objective = config.make_objective()
        self._train, self._validation = train, validation
        if "log_proposal" in self.objective.needs:
            _require_samples(train, config.objective)
        rows = torch.cat([train.chosen, train.rejected]).unique()
        mean, std = feature_scale(answers.features[rows])
        reward.feature_mean.copy_(mean)
        reward.feature_std.copy_(std)
        self._answers = answers
        self._logprobs = answers.logprobs
        self.history: list[Epoch] = []

    def train(self) -> Epoch:
        """Train; returns the pass whose weights the reward now has."""
        config, reward = self.config, self.reward
        steps = math.ceil(len(self._train.chosen) / config.batch_size)
        optimizer = Optimizer(reward, config.optimizer, config.epochs * steps)
        best: Epoch | None = None
        weights: dict[str, Any] = {}
        for epoch in range(1, config.epochs + 1):
            reward.train()
            losses = []
            order = self._order(epoch)
            for low in range(0, len(order), config.batch_size):
                optimizer.zero_grad()
                result = self.objective.loss(self._batch(order[low : low + config.batch_size]))
                result.loss.backward()
                optimizer.step()
                self.objective.after_step(reward)
                losses.append(float(result.loss.detach()))
            reward.eval()
            row = Epoch(
                epoch=epoch,
                loss=sum(losses) / len(losses),
                train_accuracy=self._accuracy(self._train),
                validation_accuracy=self._accuracy(self._validation),
            )
            self.history.append(row)
            if best is None or row.validation_accuracy > best.validation_accuracy:
                best, weights = row, copy.deepcopy(reward.state_dict())
            elif epoch - best.epoch >= config.patience:
                break
        assert best is not None
        reward.load_state_dict(weights)
        reward.normalizer.update(self.scores()[torch.cat([self._train.chosen, self._train.rejected]).unique()])
        return best

    def scores(self) -> Tensor:
        """Raw rewards [R] of every answer, as the reward is now."""
        return score_answers(self.reward, self._answers)

    def _order(self, epoch: int) -> list[int]:
        """Pairs in a random order in which those of a prompt stand together: a normaliser is estimated from them."""
        shuffled = torch.tensor(permutation(len(self._train.prompt), self.config.seed, "pairs", epoch))
        prompts = torch.tensor(permutation(int(self._train.prompt.max()) + 1, self.config.seed, "prompts", epoch))
        place = prompts[self._train.prompt[shuffled]]
        return shuffled[torch.argsort(place, stable=True)].tolist()

    def _batch(self, places: list[int]) -> RewardBatch:
        pairs = Pairs(*(column[places] for column in self._train))
        if self.objective.pairwise:
            groups = torch.arange(len(places))
            experts, expert_groups, samples, sample_groups = pairs.chosen, groups, pairs.rejected, groups
        else:
            experts, expert_groups = _distinct(pairs.chosen, pairs.prompt)
            samples, sample_groups = _distinct(pairs.rejected, pairs.prompt)
        device = self.reward.feature_mean.device
        features = self.reward.standardise(self._answers.features[torch.cat([experts, samples])].to(device))
        rewards = self.reward.head(features).cpu()
        return RewardBatch(
            expert_rewards=rewards[: len(experts)],
            sample_rewards=rewards[len(experts) :],
            expert_groups=expert_groups,
            sample_groups=sample_groups,
            # The base drew the rejected answers, and it is the base of the model p ~ base * exp(r / beta).
            log_proposal=self._logprobs[samples],
            log_base=self._logprobs[samples],
            expert_log_base=self._logprobs[experts],
            expert_logprobs=self._logprobs[experts],
            sample_logprobs=self._logprobs[samples],
            expert_features=features[: len(experts)],
            sample_features=features[len(experts) :],
            score=self.reward.head,
            parameters=tuple(self.reward.parameters()),
            beta=self.config.beta,
        )

    def _accuracy(self, pairs: Pairs) -> float:
        scores = self.scores()
        difference = scores[pairs.chosen] - scores[pairs.rejected]
        return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


@torch.no_grad()
def score_answers(reward: PooledRewardModel, answers: Answers) -> Tensor:
    """Raw rewards [R] of answers that were read and pooled as the reward asks for; dropout off."""
    with evaluating(reward):
        return reward.head(reward.standardise(answers.features.to(reward.feature_mean.device))).cpu()


def shuffled_pairs(pairs: Pairs, seed: int) -> Pairs:
    """A random half of the pairs the other way round: nothing is left in them to learn."""
    turned = torch.tensor(permutation(len(pairs.chosen), seed, "shuffled labels", 0)) % 2 == 0
    return pairs._replace(
        chosen=torch.where(turned, pairs.rejected, pairs.chosen),
        rejected=torch.where(turned, pairs.chosen, pairs.rejected),
    )


def _distinct(rows: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Each (row, prompt) once."""
    both = torch.unique(torch.stack([rows, prompts]), dim=1)
    return both[0], both[1]


def _require_samples(pairs: Pairs, objective: str) -> None:
    _, prompts = _distinct(pairs.rejected, pairs.prompt)
    counts = torch.bincount(prompts)
    if int(counts.min()) < 2:
        raise ValueError(
            f"{objective} estimates a normaliser from a prompt's rejected answers, and {int((counts < 2).sum())} of "
            f"{len(counts)} prompts have only one: with one sample its loss has no lower bound. Sample more answers a "
            "prompt, or use bradley_terry or max_margin"
        )
