"""What a reward objective is given and what it answers: one interface between a trainer and ways to learn a reward.

A trainer fills a `RewardBatch` with the rewards of demonstrations and of samples, asks an `Objective` for the loss,
takes an optimiser step on the reward model, and trains its policy on `policy_reward` of the rewards. An objective is a
frozen dataclass whose fields are its options; irlfast/losses/registry.py knows objectives by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._rewards import check_beside, check_rewards, prompts_of, reward_summary
from .reward import RewardLoss


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTerms:
    """Token by token, for objectives that reward each token; entry [b, s] speaks of the token AT position s.

    Args:
        rewards: [B, S] rewards of the tokens, with gradient.
        mask: [B, S] bool, the response tokens, EOS included, adjacent in each row; nothing else is read.
        logprobs: [B, S] log pi of each token under the policy that sampled.
        potentials: [B, S] shaping potential h of the state BEFORE each token, with gradient; None is no shaping. After
            the last token it is 0.
    """

    rewards: Tensor
    mask: Tensor
    logprobs: Tensor
    potentials: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardBatch:
    """E demonstrations and K samples of their prompts. Rows that share an integer id answer the same prompt.

    Optional fields are filled where an objective's `needs` names them; `require` says so where one is missing.

    Args:
        expert_rewards, sample_rewards: [E] and [K] raw rewards, with gradient.
        expert_groups, sample_groups: [E] and [K] integer prompt ids; both, or neither where there is one prompt. For
            pairs (chosen, rejected) both are range(P).
        log_proposal: [K] log-prob of each sample under the sampler that drew it, whichever it was (replayed samples of
            earlier policies have their own).
        log_base, expert_log_base: [K] and [E] log b of the model p ~ b exp(r / beta); None is b = 1.
        expert_logprobs, sample_logprobs: [E] and [K] log pi under the policy that drew the samples, temperature 1.
        expert_tokens, sample_tokens: the same rewards token by token.
        expert_features, sample_features: [E, F] and [K, F] pooled features, which the reward is a function of.
        score: that function, [N, F] -> [N], differentiable with respect to the features.
        parameters: what is trained, for penalties on its size.
        beta: temperature of the model; a trainer's weight of KL or entropy.

    Raises:
        TypeError, ValueError: vectors that do not fit one another, or a beta that is not positive.
    """

    expert_rewards: Tensor
    sample_rewards: Tensor
    expert_groups: Tensor | None = None
    sample_groups: Tensor | None = None
    log_proposal: Tensor | None = None
    log_base: Tensor | None = None
    expert_log_base: Tensor | None = None
    expert_logprobs: Tensor | None = None
    sample_logprobs: Tensor | None = None
    expert_tokens: TokenTerms | None = None
    sample_tokens: TokenTerms | None = None
    expert_features: Tensor | None = None
    sample_features: Tensor | None = None
    score: Callable[[Tensor], Tensor] | None = None
    parameters: tuple[Tensor, ...] = ()
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_rewards(expert_rewards=self.expert_rewards, sample_rewards=self.sample_rewards)
        for name in ("log_proposal", "log_base", "sample_logprobs"):
            check_beside(name, getattr(self, name), "sample_rewards", self.sample_rewards)
        for name in ("expert_log_base", "expert_logprobs"):
            check_beside(name, getattr(self, name), "expert_rewards", self.expert_rewards)
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}; expected a positive temperature of the reward")

    def require(self, name: str, objective: str) -> Tensor:
        """The tensor of an optional field. ValueError: it was not given, naming the `objective` that asks for it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{objective} needs {name}: give it to RewardBatch")
        return value

    def summary(self) -> dict[str, Tensor]:
        """Metrics of the rewards that every objective reports: see `_rewards.reward_summary`."""
        prompts, expert_index = prompts_of(
            self.expert_rewards, self.sample_rewards, self.expert_groups, self.sample_groups
        )
        return reward_summary(self.expert_rewards.detach(), self.sample_rewards.detach(), expert_index, prompts)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Rewards of every pair (demonstration, sample) of one prompt: chosen [P] and rejected [P]."""
        prompts, expert_index = prompts_of(
            self.expert_rewards, self.sample_rewards, self.expert_groups, self.sample_groups
        )
        counts = prompts.counts[expert_index]
        expert = torch.repeat_interleave(torch.arange(len(expert_index), device=counts.device), counts)
        # Where each pair's sample stands among those of its prompt, then among all.
        place = torch.arange(len(expert), device=counts.device) - (counts.cumsum(0) - counts)[expert]
        sample = prompts.order[prompts.offsets[expert_index][expert] + place]
        return self.expert_rewards[expert], self.sample_rewards[sample]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of the reward objectives. Fields of a subclass, a frozen keyword-only dataclass, are its options.

    pairwise: the loss reads rewards only through differences of a demonstration and a sample of its prompt.
    """

    pairwise: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional RewardBatch fields that `loss` reads."""
        return frozenset()

    @property
    def takes_replay(self) -> bool:
        """Whether samples of earlier policies may join the batch, each with its own log_proposal."""
        return False

    @abstractmethod
    def loss(self, batch: RewardBatch) -> RewardLoss:
        """The loss to minimise and its metrics: detached 0-d tensors, the same names for every batch."""

    def policy_reward(self, rewards: Tensor) -> Tensor:
        """What the policy maximises, from raw rewards [B]: an increasing function of them, by default themselves."""
        return rewards

    def after_step(self, reward_model: nn.Module) -> None:
        """Called after each optimiser step of the reward model, to project its parameters; by default nothing."""
        return
