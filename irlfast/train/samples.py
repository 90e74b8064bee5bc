"""What a run keeps of its evaluations for a person to read: ``samples.jsonl``, one object an evaluation.

iteration         of the evaluation
reward_level      mean of the rewards served so far, what a reward is compared with; reward_scale their deviation
expert_rewards    raw rewards of the held-out demonstrations
policy_rewards    raw rewards of the policy's answers to the same prompts
rows              the best and worst of the policy's answers and the best and worst demonstrations, each with
                  source ("policy" or "demonstration"), prompt, tokens (pieces of text that join to the response),
                  their ids, reward, and, where the reward model gives them, token_rewards and their kind (TokenRewards)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from irlfast.rewards import TokenRewards
from irlfast.rollout import Sequences

Decode = Callable[[Sequence[int]], list[str]]
RewardTokens = Callable[[Sequences], TokenRewards]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a reward says of sequences: raw rewards [B], and what they are made of, by name."""

    rewards: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


def evaluation_record(
    iteration: int,
    *,
    policy: tuple[Sequences, Judgement],
    experts: tuple[Sequences, Judgement],
    token_rewards: RewardTokens | None = None,
    decode: Decode | None = None,
    level: float = 0.0,
    scale: float = 1.0,
    keep: int = 4,
) -> dict[str, Any]:
    """One row of ``samples.jsonl``.

    Args:
        iteration: of the evaluation.
        policy, experts: the policy's answers and the held-out demonstrations, and what the reward says of them.
        token_rewards: rewards of the tokens of sequences, where the reward model gives them.
        decode: token ids -> as many pieces of text; None writes the ids themselves.
        level, scale: mean and standard deviation of the rewards served so far.
        keep: how many of the best and of the worst rows of the policy are kept; of the demonstrations half as many.
    """
    rows = [
        *response_rows("policy", *policy, _extremes(policy[1].rewards, keep), token_rewards, decode),
        *response_rows("demonstration", *experts, _extremes(experts[1].rewards, keep // 2), token_rewards, decode),
    ]
    return {
        "iteration": iteration,
        "reward_level": _short(level),
        "reward_scale": _short(scale),
        "expert_rewards": [_short(r) for r in experts[1].rewards.tolist()],
        "policy_rewards": [_short(r) for r in policy[1].rewards.tolist()],
        "rows": rows,
    }


def response_rows(
    source: str,
    sequences: Sequences,
    judgement: Judgement,
    picked: Sequence[int],
    token_rewards: RewardTokens | None = None,
    decode: Decode | None = None,
) -> list[dict[str, Any]]:
    """The picked responses as text, with their rewards and those of their tokens: entries of "rows" above."""
    decode = decode or _ids
    part = sequences.select(list(picked))
    tokens = token_rewards(part) if token_rewards is not None and picked else None
    rows = []
    for place, index in enumerate(picked):
        ids, mask = part.input_ids[place], part.response_mask[place]
        # Decoded together: some tokenizers drop the space in front of a text's first token.
        pieces = decode(ids[part.attention_mask[place]].tolist())
        start = int(part.prompt_lengths[place])
        row: dict[str, Any] = {
            "source": source,
            "index": index,
            "prompt": "".join(pieces[:start]),
            "tokens": pieces[start:],
            "ids": ids[mask].tolist(),
            "reward": _short(float(judgement.rewards[index])),
        }
        if judgement.components:
            row["components"] = {name: _short(float(v[index])) for name, v in judgement.components.items()}
        if tokens is not None:
            row["token_rewards"] = [_short(v) for v in tokens.values[place][mask].tolist()]
            row["kind"] = tokens.kind
        rows.append(row)
    return rows


def _extremes(rewards: Tensor, keep: int) -> list[int]:
    """Indices of the `keep` highest rewards, best first, then of the `keep` lowest, worst last; none twice."""
    order: list[int] = rewards.argsort(descending=True, stable=True).tolist()
    return order if len(order) <= 2 * keep else [*order[:keep], *order[len(order) - keep :]]


def _ids(ids: Sequence[int]) -> list[str]:
    return [f"{i} " for i in ids]


def _short(value: float) -> float | None:
    """Six significant digits, and null for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
