"""Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16) over ragged sequences.

Over the unmasked tokens of a sequence, from the last to the first, with A = 0 and V = last_values (0) after the end:

    delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + V_t

t + 1 is the next unmasked token: masked ones, such as a tool's output inside a response, are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    address,
    cpu_kernel_unavailable,
    not_in_this_release,
    runs_undispatched,
    select,
)
from irlfast.ops._gae_triton import gae_triton
from irlfast.ops._segments import (
    Sequences,
    check_offsets_form,
    compute_dtype,
    native_mask,
    native_segments,
    offsets_beside,
    require_floating,
)
from irlfast.ops._segments_triton import triton_takes


class Gae(NamedTuple):
    """Both shaped as the rewards, detached, 0 where masked."""

    advantages: Tensor
    returns: Tensor


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Gae:
    """The specification of `gae`: one token after the other, all sequences side by side, in float64."""
    dtype = compute_dtype(rewards, values)
    sequences = Sequences(rewards, cu_seqlens)
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    r, v = (torch.where(real, x.detach().double(), 0.0) for x in (rewards, values))
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    flat = [x.reshape(-1) for x in (r, v, real, advantages, returns)]
    if sequences.offsets is None:
        rows, width = rewards.shape
        begins = torch.arange(rows, device=r.device) * width
        lengths = torch.full_like(begins, width)
    else:
        begins, lengths = sequences.offsets[:-1], sequences.offsets.diff()
    advantage = r.new_zeros(len(begins))
    value = advantage if last_values is None else last_values.detach().double()
    for step in range(int(lengths.max()) if len(lengths) else 0):
        inside = (lengths > step).nonzero()[:, 0]
        t = (begins + lengths - 1 - step)[inside]
        t, inside = t[flat[2][t]], inside[flat[2][t]]
        now = flat[0][t] + gamma * value[inside] - flat[1][t] + gamma * lam * advantage[inside]
        advantage, value = advantage.index_put((inside,), now), value.index_put((inside,), flat[1][t])
        flat[3][t], flat[4][t] = now, now + flat[1][t]
    return Gae(advantages.to(dtype), returns.to(dtype))


def gae_cpu(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; rewards and values contiguous, in the type of the results."""
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = native_segments(rewards.shape, cu_seqlens)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _native.gae(
        *segments,
        rewards.data_ptr(),
        values.data_ptr(),
        address(last_values),
        DTYPE_CODES[rewards.dtype],
        address(mask),
        mask_bytes,
        mask_floating,
        gamma,
        lam,
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
    )
    del held
    return advantages, returns


LIBRARY.define(
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? last_values, float gamma, float lam)"
    " -> (Tensor, Tensor)"
)
LIBRARY.impl("gae", gae_cpu, "CPU")
LIBRARY.impl("gae", gae_triton, "CUDA")
torch.library.register_fake(
    "irlfast::gae", lambda rewards, *rest: (torch.empty_like(rewards), torch.empty_like(rewards)), lib=LIBRARY
)


def _run(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Gae:
    dtype = compute_dtype(rewards, values)
    rewards, values = (x.detach().to(dtype).contiguous() for x in (rewards, values))
    last_values = None if last_values is None else last_values.detach().to(dtype).contiguous()
    run = kernel if runs_undispatched(rewards) else torch.ops.irlfast.gae
    return Gae(*run(rewards, values, mask, offsets_beside(cu_seqlens, rewards), last_values, gamma, lam))


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run, gae_cpu), unavailable=cpu_kernel_unavailable),
    "cuda": not_in_this_release("CUDA"),
    "triton": Implementation(run=partial(_run, gae_triton), unavailable=triton_takes),
    "reference": Implementation(run=gae_reference, unavailable=lambda tensor: None),
}


def gae(
    rewards: Tensor,  # (B, T), or packed (N)
    values: Tensor,  # shaped as rewards
    mask: Tensor | None = None,  # shaped as rewards
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # (B)
    cu_seqlens: Tensor | None = None,  # (B + 1)
    impl: str = "auto",
) -> Gae:
    """Advantages and returns of every token from rewards and value estimates.

    Args:
        rewards: [B, T] reward of each token, or [N], packed, with `cu_seqlens`.
        values: V of the state before each token.
        mask: non-zero on response tokens; None counts all. What stands elsewhere, NaN included, has no influence.
        gamma: discount, in [0, 1].
        lam: weight of longer returns, in [0, 1]: 0 takes the one-step advantage, 1 the return less the value.
        last_values: [B] value of the state after the last token, for responses cut off before their end; None is 0.
        cu_seqlens: [B + 1] integer offsets; sequence i is rewards[cu_seqlens[i]:cu_seqlens[i + 1]].
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        Gae(advantages, returns), each shaped as rewards, float32 (float64 where an input is), detached, accumulated in
        float64; 0 where masked.

    Raises:
        TypeError: a tensor that is not floating point, or offsets that are not integers.
        ValueError: shapes or devices that do not fit, gamma or lam outside [0, 1], bad offsets (on a GPU, where looking
            would stall, they are held within the tensor).
        RuntimeError: an `impl` that is not available here.
    """
    require_floating(rewards=rewards, values=values)
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens)
    if rewards.ndim != (2 if cu_seqlens is None else 1):
        layout = "padded [B, T]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected {layout}")
    count = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, given, shape in (
        ("values", values, rewards.shape),
        ("mask", mask, rewards.shape),
        ("last_values", last_values, (count,)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {tuple(shape)}")
        if given is not None and given.device != rewards.device:
            raise ValueError(f"{name} is on {given.device}, rewards on {rewards.device}; move one to the other")
    if last_values is not None:
        require_floating(last_values=last_values)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} is {number}; expected a number in [0, 1]")
    result: Gae = select("gae", IMPLEMENTATIONS, impl, rewards).run(
        rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values, cu_seqlens=cu_seqlens
    )
    return result
