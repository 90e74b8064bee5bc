"""Options of the reward that learns inside a TRL trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from irlfast.train import BiLevelConfig, RewardConfig
from irlfast.train.config import require


@dataclass(frozen=True, kw_only=True)
class OnlineRewardConfig:
    """When the reward learns, from what, and what of it the trainer is given."""

    update_every: int = 1
    """Optimiser steps of the trainer after which the reward learns. Where one generation serves several steps
    (num_iterations, steps_per_generation) it learns once a generation, however small this is."""
    update_steps: int = 1
    """Optimiser steps of the reward each time; they go through as many of the newest generations, then begin again."""
    warmup_steps: int = 0
    """Optimiser steps of the trainer in which every completion is given 0, so that the policy waits (but for a KL term)
    while the reward learns to tell it from the demonstrations."""
    pairing: Literal["prompt", "pooled"] = "prompt"
    """prompt: completions are set against demonstrations of their own prompt. pooled: against any, for a data set whose
    prompts have no demonstrations; refused by max-ent, whose normaliser belongs to a prompt."""
    demonstrations_per_prompt: int = 1
    """Demonstrations drawn for each different prompt of a generation, at most as many as it has."""
    serve: Literal["normalised", "raw"] = "normalised"
    """normalised: (reward - mean) / std of the rewards given so far. raw: as it was learned, in units of `beta`."""
    fit_feature_scale: bool = True
    """Standardise the reward's features on the first generation and its demonstrations."""
    beta: float = 1.0
    """Temperature of the model p ~ base * exp(r / beta) that is fitted to the demonstrations."""
    regularizer: Literal["kl", "entropy"] = "kl"
    """base: the reference (kl) or uniform (entropy)."""
    seed: int = 0
    """Of the order in which demonstrations are drawn."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Objective, its options, penalties, replay and the reward's optimiser, as in BiLevelTrainer."""

    def __post_init__(self) -> None:
        for name in ("update_every", "update_steps", "demonstrations_per_prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a count of at least 0")
        require(self.pairing in ("prompt", "pooled"), "pairing", self.pairing, "'prompt' or 'pooled'")
        require(self.serve in ("normalised", "raw"), "serve", self.serve, "'normalised' or 'raw'")
        self.bilevel()
        if self.pairing == "pooled" and "log_proposal" in self.reward.make_objective().needs:
            raise ValueError(
                f"pairing = 'pooled' with objective {self.reward.objective!r}: its importance weights estimate a "
                "normaliser for each prompt. Give demonstrations of the data set's prompts, or use an objective "
                "without importance weights (gail, airl, contrastive, bradley_terry, max_margin)"
            )

    def bilevel(self) -> BiLevelConfig:
        """The same as the reward's trainer reads it."""
        return BiLevelConfig(
            beta=self.beta, regularizer=self.regularizer, reward_steps=self.update_steps, reward=self.reward
        )
