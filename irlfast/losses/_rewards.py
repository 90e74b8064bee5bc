"""What the reward objectives share: checks of their vectors, prompts of demonstrations and samples, common metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast.ops._segments import Groups, require_floating


def check_rewards(**rewards: Tensor) -> None:
    """TypeError or ValueError unless each is a non-empty floating-point vector that is (on the CPU) finite."""
    for name, values in rewards.items():
        require_floating(**{name: values})
        if values.dim() != 1 or not len(values):
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected a vector of at least one reward")
        if values.is_cpu and not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise ValueError(f"{name}[{row}] is {values[row].item()}; every reward must be finite")


def check_option(condition: bool, name: str, value: object, expected: str) -> None:
    """ValueError naming an objective's option, its value and what was expected, unless `condition`."""
    if not condition:
        raise ValueError(f"{name} = {value!r}, expected {expected}")


def check_beside(name: str, values: Tensor | None, partner: str, rewards: Tensor) -> None:
    """TypeError or ValueError unless `values` is None or a floating-point tensor shaped as `rewards`."""
    if values is None:
        return
    require_floating(**{name: values})
    if values.shape != rewards.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected that of {partner}, {tuple(rewards.shape)}")


def prompts_of(
    expert_rewards: Tensor, sample_rewards: Tensor, expert_groups: Tensor | None, sample_groups: Tensor | None
) -> tuple[Groups, Tensor]:
    """The samples' prompts, and which of them each demonstration belongs to: Groups, [E]. Without ids there is one."""
    if (expert_groups is None) != (sample_groups is None):
        raise ValueError("expert_groups and sample_groups go together: give both, or neither for a single prompt")
    prompts = Groups.of(sample_groups, sample_rewards, name="sample_groups")
    if expert_groups is None:
        return prompts, torch.zeros(expert_rewards.shape, dtype=torch.int64, device=expert_rewards.device)
    wanted = Groups.of(expert_groups, expert_rewards, name="expert_groups")
    missing = wanted.ids[~torch.isin(wanted.ids, prompts.ids)]
    if len(missing):
        shown = ", ".join(str(i) for i in missing[:5].tolist()) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"expert_groups names {len(missing)} group(s) without samples in sample_groups: {shown}; "
            "sample each demonstration's own prompt, for the normaliser depends on it"
        )
    return prompts, torch.searchsorted(prompts.ids, wanted.ids)[wanted.index]


def reward_summary(expert: Tensor, sample: Tensor, expert_index: Tensor, prompts: Groups) -> dict[str, Tensor]:
    """Metrics that every objective reports, from detached rewards: expert_reward, sample_reward (means), margin (their
    difference), auc (see reward_auc), max_abs_reward."""
    return {
        "expert_reward": expert.mean(),
        "sample_reward": sample.mean(),
        "margin": expert.mean() - sample.mean(),
        "auc": reward_auc(expert, expert_index, sample, prompts),
        "max_abs_reward": torch.maximum(expert.abs().max(), sample.abs().max()),
    }


def reward_auc(expert: Tensor, expert_index: Tensor, sample: Tensor, prompts: Groups) -> Tensor:
    """Mann-Whitney statistic over all (demonstration, sample) pairs of one prompt, ties counting half.

    Rewards become integer ranks and prompt and rank one key, so that a single sort serves every prompt.
    """
    ranks = torch.unique(torch.cat([expert, sample]), return_inverse=True)[1]
    width = len(ranks) + 1
    keys = torch.sort(prompts.index * width + ranks[len(expert) :]).values
    wanted = expert_index * width + ranks[: len(expert)]
    below = torch.searchsorted(keys, wanted, right=False) - prompts.offsets[expert_index]
    up_to = torch.searchsorted(keys, wanted, right=True) - prompts.offsets[expert_index]
    wins = (below + up_to).sum().double() / 2
    return (wins / prompts.counts[expert_index].sum()).to(expert.dtype)
