"""What one round of sampling gives to the two updates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from irlfast.rollout import Rollouts, Sequences


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the frozen models say of sequences.

    Args:
        inputs: the reward's positional inputs (irlfast.rewards).
        log_base: [B] log b(y|x).
        base_logprobs: [B, S] its terms, token by token; 0 outside the response.
    """

    inputs: tuple[Tensor, ...]
    log_base: Tensor
    base_logprobs: Tensor


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Demonstrations and the policy's own answers to the same prompts; equal prompts are one group.

    Where the objective asks, under the policy that sampled: expert_logprobs [E] log pi(y|x) of the demonstrations, and
    expert_token_logprobs [E, S] its terms, 0 outside the response.
    """

    experts: Sequences
    samples: Rollouts
    scored: Scored
    expert_logprobs: Tensor | None = None
    expert_token_logprobs: Tensor | None = None
