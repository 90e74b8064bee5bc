"""Advantages from rewards alone: each response against the others of its prompt.

Over one group of K rewards R_i with mean R-bar and standard deviation s:

    grpo      (R_i - R-bar) / (s + eps)                      Shao et al. 2024 (DeepSeekMath)
    dr_grpo   R_i - R-bar                                    Liu et al. 2025
    rloo      R_i - mean_{j != i} R_j = K/(K-1) (R_i - R-bar)         Kool et al. 2019; Ahmadian et al. 2024

s divides by K - 1, as torch.std does. A group of one, or whose rewards are all equal, has advantage exactly 0: it says
nothing about which response is better, and rounding noise over eps must not say it instead.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from irlfast.ops._segments import Groups, compute_dtype, require_floating

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
ADVANTAGE_KINDS: tuple[str, ...] = get_args(AdvantageKind)


def group_advantages(
    rewards: Tensor,  # (N)
    groups: Tensor,  # (N)
    *,
    kind: AdvantageKind,
    eps: float = 1e-6,
) -> Tensor:  # (N)
    """Advantage of each response within its group.

    Args:
        rewards: [N] one reward a response.
        groups: [N] integer prompt ids, in any order, groups of any size.
        kind: "grpo", "dr_grpo" or "rloo".
        eps: added to the standard deviation of "grpo".

    Returns:
        [N] float32 (float64 for float64 rewards), detached, computed in float64.

    Raises:
        TypeError: rewards that are not floating point, or groups that are not integers.
        ValueError: shapes that do not fit, an unknown kind, or (on the CPU) a reward that is not finite.
    """
    require_floating(rewards=rewards)
    if kind not in ADVANTAGE_KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {ADVANTAGE_KINDS}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected [N], one reward a response")
    if rewards.is_cpu and not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).nonzero()[0, 0])
        raise ValueError(f"rewards[{row}] is {rewards[row].item()}; every reward must be finite")
    if not len(rewards):
        return rewards.detach().to(compute_dtype(rewards))
    values = rewards.detach().double()
    by_group = Groups.of(groups, values)
    count = by_group.counts.double()
    centred = values - by_group.mean(values)[by_group.index]
    if kind == "grpo":
        std = (by_group.sum(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)[by_group.index]
    elif kind == "rloo":
        centred = centred * (count / (count - 1).clamp(min=1))[by_group.index]
    constant = by_group.max(values) == -by_group.max(-values)
    return torch.where(constant[by_group.index], 0.0, centred).to(compute_dtype(rewards))


def whiten(x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """Shift and scale the unmasked values to mean 0 and standard deviation 1: (x - mean) / (std + eps).

    Args:
        x: any shape.
        mask: non-zero on the values that count, shaped as x; None counts all. What stands elsewhere, NaN included,
            has no influence, and the result is 0 there.
        eps: added to the standard deviation, which divides by n - 1.

    Returns:
        As x, in float32 (float64 for float64 input). A single value, or values all equal, gives 0. Differentiable.

    Raises:
        TypeError: x is not floating point. ValueError: mask is not shaped as x.
    """
    require_floating(x=x)
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected that of x, {tuple(x.shape)}")
    if x.numel() == 0:
        return x.to(compute_dtype(x))
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    values = torch.where(real, x.double(), 0.0)
    count = real.sum()
    centred = torch.where(real, values - values.sum() / count.clamp(min=1), 0.0)
    highest = torch.where(real, values, -torch.inf).max()
    lowest = torch.where(real, values, torch.inf).min()
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    # The root's slope is infinite at 0, and 0 * inf is NaN: a constant is set apart before it, not after.
    constant = highest <= lowest
    std = torch.where(constant, 1.0, variance).sqrt()
    return torch.where(real & ~constant, centred / (std + eps), 0.0).to(compute_dtype(x))
