"""Rewards made relative to their group, where slime then takes them for advantages.

What slime does with them depends on --advantage-estimator, and so does what they have to be:

    grpo, gspo, cispo               a token's advantage is its response's number: (R - mean) / (std + eps), or R - mean
                                    with --disable-grpo-std-normalization
    reinforce_plus_plus_baseline    the same with R - mean; slime whitens it over the batch
    ppo, reinforce_plus_plus        the number is the reward of the last token: R as it is

The mean of a group of one is its reward. Unlike slime, which compares a reward with the whole batch as soon as groups
are not all of n_samples_per_prompt, a reward is compared with those of its own prompt whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from irlfast.losses import group_advantages

from .samples import flat

_RELATIVE = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
_AS_THEY_ARE = ("ppo", "reinforce_plus_plus")


def post(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """--custom-reward-post-process-path irlfast.integrations.slime.post.

    Args:
        args: advantage_estimator, grpo_std_normalization, rewards_normalization, reward_key, n_samples_per_prompt; and
            irlfast_advantages, a kind of `losses.group_advantages` ("rloo") in place of the estimator's own.
        samples: with group_index, which says the prompt; without it, n_samples_per_prompt after one another are one's.

    Returns:
        The rewards as they are, for the log, and what slime is to train on, both in the samples' order.

    Raises:
        ValueError: a sample without a reward or with one that is not finite, an estimator that is not known, or
            samples whose prompts cannot be told.
    """
    rows = list(flat(samples))
    raw = [_reward(args, sample, i) for i, sample in enumerate(rows)]
    estimator = getattr(args, "advantage_estimator", "grpo")
    if estimator not in _RELATIVE + _AS_THEY_ARE:
        raise ValueError(f"advantage_estimator is {estimator!r}; expected one of {_RELATIVE + _AS_THEY_ARE}")
    kind: Any = getattr(args, "irlfast_advantages", None)
    if kind is None:
        scaled = estimator != "reinforce_plus_plus_baseline" and getattr(args, "grpo_std_normalization", True)
        kind = "grpo" if scaled else "dr_grpo"
    elif estimator in _AS_THEY_ARE:
        raise ValueError(
            f"irlfast_advantages is {kind!r} with advantage_estimator {estimator!r}, which makes its own advantages: "
            "use grpo, gspo, cispo or reinforce_plus_plus_baseline"
        )
    if estimator in _AS_THEY_ARE or not getattr(args, "rewards_normalization", True):
        return raw, list(raw)
    relative = group_advantages(torch.tensor(raw, dtype=torch.float64), _groups(args, rows), kind=kind)
    return raw, relative.tolist()


def _reward(args: Any, sample: Any, number: int) -> float:
    key = getattr(args, "reward_key", None)
    value = sample.reward if not key or sample.reward is None else sample.reward[key]
    if value is None:
        raise ValueError(
            f"samples[{number}] (index {sample.index}, {sample.status}) has no reward: an aborted sample is not to be "
            "trained on, and a stale one that was cleared has to be scored again"
        )
    return float(value)


def _groups(args: Any, samples: Sequence[Any]) -> torch.Tensor:
    known = [sample.group_index for sample in samples]
    if all(index is not None for index in known):
        return torch.tensor(known, dtype=torch.int64)
    size = int(getattr(args, "n_samples_per_prompt", len(samples)))
    if len(samples) % size:
        raise ValueError(
            f"{len(samples)} samples, some without group_index, are no multiple of n_samples_per_prompt = {size}: "
            "their prompts cannot be told. Set group_index"
        )
    return torch.arange(len(samples)) // size
