"""Advantages from rewards alone, each response against the others of its prompt; and rewards a token for `ops.gae`.

Over one group of K rewards R_i with mean R-bar and standard deviation s:

    grpo      (R_i - R-bar) / (s + eps)                      Shao et al. 2024 (DeepSeekMath)
    dr_grpo   R_i - R-bar                                    Liu et al. 2025
    rloo      R_i - mean_{j != i} R_j = K/(K-1) (R_i - R-bar)         Kool et al. 2019; Ahmadian et al. 2024

s divides by K - 1, as torch.std does. A group of one, or whose rewards are all equal, has advantage exactly 0: it says
nothing about which response is better, and rounding noise over eps must not say it instead.

`shaped_rewards` spreads a response's reward R over its tokens, less the KL penalty (k1, the estimator that belongs in a
reward): r_t = -beta (old_t - ref_t), and R besides at the last unmasked token (Ouyang et al. 2022, InstructGPT).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from irlfast.ops._segments import Groups, Sequences, check_offsets_form, compute_dtype, require_floating

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


def shaped_rewards(
    rewards: Tensor,  # (B)
    old_logprobs: Tensor,  # (B, T), or packed (N)
    ref_logprobs: Tensor,  # shaped as old_logprobs
    mask: Tensor | None = None,  # shaped as old_logprobs
    *,
    beta: float,
    cu_seqlens: Tensor | None = None,  # (B + 1)
) -> Tensor:  # shaped as old_logprobs
    """Reward of each token: minus beta times its log-ratio to the reference, and the response's own at the last.

    Over the unmasked tokens of a response they sum to R - beta (log pi_old(y|x) - log pi_ref(y|x)). A response without
    one has nowhere to put R.

    Args:
        rewards: [B] one reward a response.
        old_logprobs: [B, T] log-probs under the policy that sampled, or [N], packed, with `cu_seqlens`.
        ref_logprobs: under the reference policy.
        mask: non-zero on response tokens; None counts all. What stands elsewhere, NaN included, has no influence.
        beta: weight of the penalty, at least 0.
        cu_seqlens: [B + 1] integer offsets; response i is old_logprobs[cu_seqlens[i]:cu_seqlens[i + 1]].

    Returns:
        Shaped as old_logprobs, float32 (float64 where an input is), detached, computed in float64; 0 where masked.

    Raises:
        TypeError: a tensor that is not floating point, or offsets that are not integers.
        ValueError: shapes or devices that do not fit, a negative beta, offsets that do not rise from 0 to N.
    """
    require_floating(rewards=rewards, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; expected a number that is at least 0")
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens)
    shape, device = old_logprobs.shape, old_logprobs.device
    if len(shape) != (2 if cu_seqlens is None else 1):
        layout = "padded [B, T]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        raise ValueError(f"old_logprobs has shape {tuple(shape)}; expected {layout}")
    count = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, values, expected in (
        ("rewards", rewards, (count,)),
        ("ref_logprobs", ref_logprobs, shape),
        ("mask", mask, shape),
    ):
        if values is not None and values.shape != expected:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {tuple(expected)}")
        if values is not None and values.device != device:
            raise ValueError(f"{name} is on {values.device}, old_logprobs on {device}; move one to the other")
    real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    sequences = Sequences(old_logprobs, cu_seqlens)
    # The last unmasked token is where the count of them, over the whole batch, first reaches what its response ends at.
    seen = real.flatten().cumsum(0).view(shape)
    last = real & (seen == sequences.spread(sequences.sum(real).cumsum(0)))
    old, ref = old_logprobs.detach().double(), ref_logprobs.detach().double()
    own = torch.where(last, sequences.spread(rewards.detach().double()), 0.0)
    shaped = own - beta * torch.where(real, old - ref, 0.0)
    return torch.where(real, shaped, 0.0).to(compute_dtype(rewards, old_logprobs, ref_logprobs))


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
