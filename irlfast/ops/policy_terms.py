"""Policy-gradient losses over the log-probs of sampled tokens, with their gradient and metrics, in one sweep.

With rho_t = exp(logp_t - old_t) (the logarithm held within +-20), A the advantage and m the mask, a token's term is

    reinforce   -A_t logp_t
    ppo         -min(rho_t A_t, clip(rho_t, 1 - lo, 1 + hi) A_t), and with dual_clip = c at most -c A_t where A_t < 0
    gspo        ppo with rho = exp(mean_t (logp_t - old_t)) in place of rho_t: one ratio a sequence, and its gradient
                goes through that mean
    cispo       -stopgrad(min(rho_t, 1 + hi)) A_t logp_t

times a correction for a sampler that is not the policy the step started from: with r = exp(old - rollout) of the token,
or of the sum over its sequence, min(r, tis_cap), and 0 where r lies outside icepop_band. To it are added

    kl_coef * k2,  k2 = d^2 / 2,   or   kl_coef * rho_t * k3,  k3 = exp(-d) - 1 + d,        d = logp_t - ref_t >= -20
    -entropy_coef * entropy_t

and `irlfast.losses.aggregation` says how all that becomes one number. The loss is a scalar, so its gradient is known as
soon as it is: the forward pass writes it, and backward scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._aggregation import AGGREGATIONS, Aggregation, aggregate, check_aggregation, masked_mean, positive
from irlfast.ops._cuda import cuda_unavailable, on_gpu
from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    address,
    cpu_kernel_unavailable,
    runs_undispatched,
    select,
)
from irlfast.ops._policy_terms_cuda import sweep_cuda
from irlfast.ops._policy_terms_triton import sweep_triton
from irlfast.ops._segments import (
    Sequences,
    check_offsets_form,
    native_mask,
    native_segments,
    offsets_beside,
    require_floating,
)
from irlfast.ops._segments_triton import triton_takes
from irlfast.ops.kl_estimate import ESTIMATORS

# Of the three enumerations and the maximum, csrc/include/irlfast/policy_terms.h has the same.
TERMS = ("reinforce", "ppo", "gspo", "cispo")
METRICS = (
    "policy",
    "tokens",
    "sequences",
    "approx_kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "ess",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "kl",
    "entropy",
    "rollout_gap",
    "rollout_gap_max",
    "rollout_kl",
    "tis_fraction",
    "icepop_fraction",
)

# exp overflows float32 past 88, and inf in the branch that min rejects still makes the gradient 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


class PolicyTerms(NamedTuple):
    """loss: 0-d, to minimise. metrics: [len(METRICS)], detached; those whose input is missing hold 0, ratios 1."""

    loss: Tensor
    metrics: Tensor


def policy_terms_reference(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    term: str = "reinforce",
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    icepop_band: tuple[float, float] | None = None,
    correction_level: str = "token",
    aggregation: str = "token_mean",
    denominator: float | Tensor | None = None,
    keep: Tensor | None = None,
) -> PolicyTerms:
    """The specification of `policy_terms`, in plain torch, differentiable; in float64 where an input is."""
    dtype = _compute_dtype(logprobs, advantages, old_logprobs, ref_logprobs, rollout_logprobs, entropy)
    sequences = Sequences(logprobs, cu_seqlens)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    if keep is not None:
        mask = mask & sequences.spread(keep)
    # Nothing under the mask enters any expression: 0 * NaN is NaN.
    if _one_a_sequence(advantages, logprobs, cu_seqlens, term):
        advantages = sequences.spread(advantages)
    advantage = torch.where(mask, advantages.detach().to(dtype), 0.0)
    logp = torch.where(mask, logprobs.to(dtype), 0.0)
    tokens = sequences.sum(mask)

    def given(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(mask, values.detach().to(dtype), 0.0)

    old, ref, rollout = given(old_logprobs), given(ref_logprobs), given(rollout_logprobs)
    metrics = dict.fromkeys(METRICS, logp.new_zeros(()))
    metrics |= dict.fromkeys(("ratio_mean", "ratio_min", "ratio_max", "ess"), logp.new_ones(()))
    metrics |= {"tokens": tokens.sum(), "sequences": (tokens > 0).sum()}

    log_ratio = logp - (logp.detach() if old is None else old)
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    used, counted = ratio, mask
    if term == "gspo":
        mean = (sequences.sum(log_ratio) / tokens.clamp(min=1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).to(dtype)
        used, counted = torch.exp(mean), tokens > 0
    if old is not None:
        metrics["approx_kl"] = masked_mean(_k3(-log_ratio.detach()), mask)
        metrics |= _ratio_metrics(used.detach(), counted)

    clipped_term = term in ("ppo", "gspo")
    if clipped_term:
        if term == "gspo":
            used = sequences.spread(used)
        terms, stopped = _clipped_terms(used, advantage, clip, dual_clip)
    elif term == "cispo":
        terms = -ratio.detach().clamp(max=1 + clip[1]) * advantage * logp
        stopped = ratio > 1 + clip[1]
    else:
        terms, stopped = -advantage * logp, torch.zeros_like(mask)
    low, high = ((stopped & side & mask).to(dtype) for side in (used.detach() < 1, used.detach() > 1))
    metrics |= {"clip_fraction_low": masked_mean(low, mask), "clip_fraction_high": masked_mean(high, mask)}
    metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]

    if rollout is not None:
        gap = (logp.detach() if old is None else old) - rollout
        metrics |= {"rollout_gap": masked_mean(gap.abs(), mask), "rollout_kl": masked_mean(_k3(-gap), mask)}
        metrics["rollout_gap_max"] = _extreme(gap.abs(), mask, 0.0, torch.maximum)
        if correction_level == "sequence":
            gap = sequences.spread(sequences.sum(gap).to(dtype))
        sampled = torch.exp(gap.clamp(max=MAX_LOG_RATIO))
        capped, outside = torch.zeros_like(mask), torch.zeros_like(mask)
        if tis_cap is not None:
            capped = sampled > tis_cap
        if icepop_band is not None:
            outside = (sampled < icepop_band[0]) | (sampled > icepop_band[1])
        if tis_cap is not None or icepop_band is not None:
            weight = sampled if tis_cap is None else sampled.clamp(max=tis_cap)
            terms = torch.where(outside, 0.0, terms * weight)
        metrics["tis_fraction"] = masked_mean((capped & mask).to(dtype), mask)
        metrics["icepop_fraction"] = masked_mean((outside & mask).to(dtype), mask)
    metrics["policy"] = aggregate(terms.detach(), mask, aggregation, denominator, cu_seqlens=cu_seqlens)

    if ref is not None:
        d = logp - ref
        kl = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: _k3(d)}[kl_estimator]()
        metrics["kl"] = masked_mean(kl.detach(), mask)
        if kl_coef:
            terms = terms + kl_coef * (ratio * kl if kl_estimator == "k3" else kl)
    if entropy is not None:
        entropy = torch.where(mask, entropy.to(dtype), 0.0)
        metrics["entropy"] = masked_mean(entropy.detach(), mask)
        if entropy_coef:
            terms = terms - entropy_coef * entropy
    loss = aggregate(terms, mask, aggregation, denominator, cu_seqlens=cu_seqlens)
    return PolicyTerms(loss, torch.stack([metrics[name].to(dtype) for name in METRICS]))


def _clipped_terms(
    ratio: Tensor, advantage: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The terms, and where the clip has stopped the gradient."""
    plain = -ratio * advantage
    clipped = -ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    terms, stopped = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantage
        beyond = (advantage < 0) & (terms > bound)
        terms, stopped = torch.where(beyond, bound, terms), stopped | beyond
    return terms, stopped.detach()


def _k3(d: Tensor) -> Tensor:
    """exp(-d) - 1 + d in float64: it is a difference of nearly equal numbers wherever d is small."""
    held = d.double().clamp(min=-MAX_LOG_RATIO)
    return (torch.expm1(-held) + held).to(d.dtype)


def _ratio_metrics(ratio: Tensor, counted: Tensor) -> dict[str, Tensor]:
    some = counted.any()
    seen = torch.where(counted, ratio, 0.0).double()
    count, total, squares = counted.sum().clamp(min=1), seen.sum(), seen.square().sum()
    values = {
        "ratio_mean": total / count,
        "ratio_min": _extreme(ratio, counted, torch.inf, torch.minimum),
        "ratio_max": _extreme(ratio, counted, -torch.inf, torch.maximum),
        "ess": total.square() / (count * squares),
    }
    return {name: torch.where(some, value, 1.0) for name, value in values.items()}


def _extreme(values: Tensor, counted: Tensor, start: float, choose: Any) -> Tensor:
    if not values.numel():
        return values.new_full((), start)
    kept = torch.where(counted, values, start)
    return kept.amin() if choose is torch.minimum else kept.amax()


LIBRARY.define(
    "policy_terms(Tensor logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? entropy, Tensor? keep, Tensor? denominator, "
    "float divisor, bool per_token, int term, float clip_low, float clip_high, float dual_clip, float kl_coef, "
    "int kl_estimator, float entropy_coef, float tis_cap, float icepop_low, float icepop_high, "
    "bool sequence_correction, int aggregation, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("policy_terms_backward(Tensor factor, Tensor slopes, Tensor logprobs) -> Tensor")

# loss, metrics, slopes by logprobs and by entropy where they are wanted, and what to multiply those by for the loss's
# gradients, None for 1: a kernel with one program a sequence does not know the batch's own count when it writes them.
Sweep = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# An op returns tensors: [0] for those that are not wanted.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sweep_cpu(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    keep: Tensor | None,
    denominator: Tensor | None,
    divisor: float,
    per_token: bool,
    term: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    tis_cap: float,
    icepop_low: float,
    icepop_high: float,
    sequence_correction: bool,
    aggregation: int,
    with_gradient: bool,
    *,
    isa: str = "auto",
) -> Sweep:
    """The native sweep. Floating-point tensors share float32 or float64; 0 stands for an option that is off."""
    if denominator is not None:
        divisor = positive(denominator)
    logprobs, advantages = logprobs.contiguous(), advantages.contiguous()
    old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep = (
        None if x is None else x.contiguous() for x in (old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep)
    )
    mask, mask_bytes, mask_floating = native_mask(mask)
    held, segments = native_segments(logprobs.shape, cu_seqlens)
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    slopes = torch.empty_like(logprobs) if with_gradient else None
    bonus = with_gradient and entropy is not None and entropy_coef != 0
    entropy_slopes = torch.empty_like(logprobs) if bonus else None
    _native.policy_terms(
        *segments,
        DTYPE_CODES[logprobs.dtype],
        logprobs.data_ptr(),
        address(old_logprobs),
        address(ref_logprobs),
        address(rollout_logprobs),
        address(entropy),
        advantages.data_ptr(),
        per_token,
        address(mask),
        mask_bytes,
        mask_floating,
        address(keep),
        term,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        entropy_coef,
        tis_cap,
        icepop_low,
        icepop_high,
        sequence_correction,
        aggregation,
        divisor,
        loss.data_ptr(),
        metrics.data_ptr(),
        address(slopes),
        address(entropy_slopes),
        torch.get_num_threads(),
        isa,
    )
    del held
    return loss, metrics, slopes, entropy_slopes, None


def _outputs(logprobs: Tensor, sweep: Sweep) -> Outputs:
    """A sweep as the registered op has it."""
    loss, metrics, slopes, entropy_slopes, scale = sweep
    nothing = (0,)
    return (
        loss,
        metrics,
        logprobs.new_empty(nothing) if slopes is None else slopes,
        logprobs.new_empty(nothing) if entropy_slopes is None else entropy_slopes,
        logprobs.new_ones(()) if scale is None else scale,
    )


def forward_cpu(logprobs: Tensor, *arguments: Any, isa: str = "auto") -> Outputs:
    return _outputs(logprobs, sweep_cpu(logprobs, *arguments, isa=isa))


def forward_cuda(logprobs: Tensor, *arguments: Any) -> Outputs:
    return _outputs(logprobs, sweep_cuda(logprobs, *arguments))


def forward_triton(logprobs: Tensor, *arguments: Any) -> Outputs:
    return _outputs(logprobs, sweep_triton(logprobs, *arguments))


def _scaled(factor: Tensor, slopes: Tensor, logprobs: Tensor) -> Tensor:
    """slopes, scaled: a new tensor, for the same graph may be differentiated again.

    The log-probs are there so that a second derivative with respect to them is asked for, and refused.
    """
    return slopes * factor


# Positions among the op's inputs.
_ENTROPY, _INPUTS = 7, 25


def _scale(grad: Tensor | None, saved: tuple[Any, ...], wanted: tuple[bool, bool]) -> list[Tensor | None]:
    """Gradients to logprobs and entropy from that of the loss; saved: logprobs, and of a sweep slopes and scale."""
    grads: list[Tensor | None] = [None, None]
    if grad is None:
        return grads
    logprobs, slopes, entropy_slopes, scale = saved
    factor = grad if scale is None else grad * scale
    if wanted[0]:
        # With create_graph the registered op is called, whose own derivative says that there is none.
        direct = not torch.is_grad_enabled() and runs_undispatched(grad)
        grads[0] = (_scaled if direct else torch.ops.irlfast.policy_terms_backward)(factor, slopes, logprobs)
    if wanted[1] and entropy_slopes is not None and entropy_slopes.shape == slopes.shape:
        grads[1] = entropy_slopes * factor  # linear: right to any order
    return grads


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], *output[2:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * _INPUTS
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[_ENTROPY]
    grads[0], grads[_ENTROPY] = _scale(grad, ctx.saved_tensors, wanted)
    return tuple(grads)


class _PolicyTerms(torch.autograd.Function):
    """Ties what a sweep returned to the two tensors it is differentiable by.

    The registered op without the dispatcher, and with none of its other inputs: either costs as much as the kernel.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, outputs: Sweep) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logprobs, *outputs[2:])
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_scale(grad, ctx.saved_tensors, ctx.needs_input_grad[:2]), None


# Function.apply without what it does in Python for torch.func, whose transforms never come here.
_apply_policy_terms: Callable[..., Tensor] = super(torch.autograd.Function, _PolicyTerms).apply


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "policy_terms: the kernel has no second derivative; use impl='reference', with padded input, where a gradient "
        "of the gradient is needed"
    )


def _forward_fake(logprobs: Tensor, *arguments: Any) -> Outputs:
    entropy, entropy_coef, with_gradient = arguments[6], arguments[17], arguments[23]
    bonus = with_gradient and entropy is not None and entropy_coef != 0
    return (
        logprobs.new_empty(()),
        logprobs.new_empty((len(METRICS),)),
        logprobs.new_empty(logprobs.shape if with_gradient else (0,)),
        logprobs.new_empty(logprobs.shape if bonus else (0,)),
        logprobs.new_empty(()),
    )


LIBRARY.impl("policy_terms", forward_cpu, "CPU")
LIBRARY.impl("policy_terms", on_gpu(forward_cuda, forward_triton), "CUDA")
LIBRARY.impl("policy_terms_backward", _scaled, "CompositeExplicitAutograd")
torch.library.register_fake("irlfast::policy_terms", _forward_fake, lib=LIBRARY)
torch.library.register_fake(
    "irlfast::policy_terms_backward", lambda factor, slopes, logprobs: torch.empty_like(slopes), lib=LIBRARY
)
torch.library.register_autograd("irlfast::policy_terms", _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd("irlfast::policy_terms_backward", _no_second_derivative, lib=LIBRARY)


def _run(
    sweep: Callable[..., Sweep],
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    term: str,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    tis_cap: float | None,
    icepop_band: tuple[float, float] | None,
    correction_level: str,
    aggregation: str,
    denominator: float | Tensor | None,
    keep: Tensor | None,
) -> PolicyTerms:
    per_token = not _one_a_sequence(advantages, logprobs, cu_seqlens, term)
    logprobs, advantages, old_logprobs, ref_logprobs, rollout_logprobs, entropy = _in_one_dtype(
        logprobs, advantages, old_logprobs, ref_logprobs, rollout_logprobs, entropy
    )
    cu_seqlens = offsets_beside(cu_seqlens, logprobs)
    wanted = torch.is_grad_enabled() and (
        logprobs.requires_grad or (entropy is not None and entropy_coef != 0 and entropy.requires_grad)
    )
    direct = runs_undispatched(logprobs)
    if not direct:
        advantages = advantages.detach()
        old_logprobs, ref_logprobs, rollout_logprobs = (
            None if x is None else x.detach() for x in (old_logprobs, ref_logprobs, rollout_logprobs)
        )
    by_tensor = isinstance(denominator, Tensor)
    low, high = icepop_band or (0.0, 0.0)
    run: Callable[..., Sweep] = sweep if direct else torch.ops.irlfast.policy_terms
    outputs = run(
        logprobs,
        advantages,
        mask,
        cu_seqlens,
        old_logprobs,
        ref_logprobs,
        rollout_logprobs,
        entropy,
        keep,
        denominator if by_tensor else None,
        0.0 if by_tensor or denominator is None else denominator,
        per_token,
        TERMS.index(term),
        *clip,
        dual_clip or 0.0,
        kl_coef,
        ESTIMATORS.index(kl_estimator),
        entropy_coef,
        tis_cap or 0.0,
        low,
        high,
        correction_level == "sequence",
        AGGREGATIONS.index(aggregation),
        wanted,
    )
    loss = _apply_policy_terms(logprobs, entropy, outputs) if direct and wanted else outputs[0]
    return PolicyTerms(loss, outputs[1])


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run, sweep_cpu), unavailable=cpu_kernel_unavailable),
    "cuda": Implementation(run=partial(_run, sweep_cuda), unavailable=cuda_unavailable),
    "triton": Implementation(run=partial(_run, sweep_triton), unavailable=triton_takes),
    "reference": Implementation(run=policy_terms_reference, unavailable=lambda tensor: None),
}


def policy_terms(
    logprobs: Tensor,  # (B, T), or packed (N)
    advantages: Tensor,  # (B), or shaped as logprobs
    mask: Tensor | None = None,  # shaped as logprobs, as all that follow
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1)
    term: Literal["reinforce", "ppo", "gspo", "cispo"] = "reinforce",
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k2",
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    icepop_band: tuple[float, float] | None = None,
    correction_level: Literal["token", "sequence"] = "token",
    aggregation: Aggregation = "token_mean",
    denominator: float | Tensor | None = None,
    keep: Tensor | None = None,  # (B)
    impl: str = "auto",
) -> PolicyTerms:
    """The loss that `losses.policy_loss` is the face of, under the names of its terms instead of its recipes.

    Gradients pass to logprobs and entropy alone. What stands outside the mask, NaN and infinities included, has no
    influence and receives gradient 0; without a single unmasked token the loss is 0.

    Args:
        logprobs: [B, T] padded, or [N] packed with `cu_seqlens`.
        advantages: [B], one a sequence, or one a token. Packed advantages with N = B are taken as one a sequence.
        mask: non-zero on the tokens that count; None counts all.
        cu_seqlens: [B + 1] integer offsets; sequence i is logprobs[cu_seqlens[i]:cu_seqlens[i + 1]].
        keep: [B] bool; False masks the whole sequence.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Every other argument, and the metrics, are as in `losses.policy_loss`; `correction_level` is its `tis_level`.

    Returns:
        PolicyTerms(loss, metrics) in float32 (float64 where an input is). The kernels differentiate once.

    Raises:
        TypeError: a tensor that is not floating point, or not of integers where offsets are meant.
        ValueError: shapes or devices that do not fit, an option outside its range, an input that an option needs. The
            values of tensors on a GPU are not looked at, which would stall: there offsets are held within the tensor,
            and a denominator that is not positive makes loss and gradients NaN.
        RuntimeError: an `impl` that is not available here.
    """
    _check_tensors(logprobs, advantages, mask, cu_seqlens, old_logprobs, ref_logprobs, rollout_logprobs, entropy, keep)
    _check_options(
        term, clip, dual_clip, kl_coef, kl_estimator, tis_cap, icepop_band, correction_level, aggregation, denominator
    )
    if term not in ("reinforce",) and old_logprobs is None:
        raise ValueError(f"term {term!r} needs old_logprobs, which was not given")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs, which was not given")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {entropy_coef} needs entropy, which was not given")
    if rollout_logprobs is None and (tis_cap is not None or icepop_band is not None):
        name, value = ("tis_cap", tis_cap) if tis_cap is not None else ("icepop_band", icepop_band)
        raise ValueError(f"{name} = {value} needs rollout_logprobs, which was not given")
    result: PolicyTerms = select("policy_terms", IMPLEMENTATIONS, impl, logprobs).run(
        logprobs,
        advantages,
        mask,
        cu_seqlens=cu_seqlens,
        term=term,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        entropy=entropy,
        clip=clip,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        tis_cap=tis_cap,
        icepop_band=icepop_band,
        correction_level=correction_level,
        aggregation=aggregation,
        denominator=denominator,
        keep=keep,
    )
    return result


def _one_a_sequence(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None, term: str) -> bool:
    if cu_seqlens is None:
        return advantages.ndim == 1
    return advantages.shape[0] == cu_seqlens.shape[0] - 1


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _in_one_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All in the type results are given in. To ask costs a tenth of what tensor.to(dtype) does, in vain."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not torch.float32:
            dtype = _compute_dtype(*tensors)
            return tuple(None if x is None else x.to(dtype) for x in tensors)
    return tensors


def _check_tensors(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
    keep: Tensor | None,
) -> None:
    if not (logprobs.is_floating_point() and advantages.is_floating_point()):
        require_floating(logprobs=logprobs, advantages=advantages)
    shape, device = logprobs.shape, logprobs.device
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"logprobs has shape {tuple(shape)}; expected [B, T], or [N] with cu_seqlens")
        rows: tuple[int, ...] = shape[:1]
    else:
        check_offsets_form(cu_seqlens)
        if len(shape) != 1:
            raise ValueError(f"logprobs has shape {tuple(shape)}; expected packed [N], as cu_seqlens is given")
        rows = (cu_seqlens.shape[0] - 1,)
    if advantages.shape not in (rows, shape):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; expected {tuple(rows)}, one a response, "
            f"or {tuple(shape)}, one a token"
        )
    for name, values in (
        ("mask", mask),
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("rollout_logprobs", rollout_logprobs),
        ("entropy", entropy),
    ):
        if values is None:
            continue
        if values.shape != shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected that of logprobs, {tuple(shape)}")
        if values.device != device:
            raise ValueError(f"{name} is on {values.device}, logprobs on {device}; move one to the other")
        if values is not mask and not values.is_floating_point():
            require_floating(**{name: values})
    if advantages.device != device:
        raise ValueError(f"advantages is on {advantages.device}, logprobs on {device}; move one to the other")
    if keep is not None and (keep.shape != rows or keep.dtype != torch.bool or keep.device != device):
        raise ValueError(
            f"keep has shape {tuple(keep.shape)}, dtype {keep.dtype} and is on {keep.device}; expected {tuple(rows)}, "
            f"torch.bool, on {device}"
        )


def _check_options(
    term: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    tis_cap: float | None,
    icepop_band: tuple[float, float] | None,
    correction_level: str,
    aggregation: str,
    denominator: float | Tensor | None,
) -> None:
    if term not in TERMS:
        raise ValueError(f"term is {term!r}; expected one of {TERMS}")
    if not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"clip is {clip}; expected (lo, hi) with lo in [0, 1] and hi at least 0")
    if dual_clip is not None and not (term in ("ppo", "gspo") and dual_clip > 1):
        raise ValueError(f"dual_clip is {dual_clip} with term {term!r}; expected more than 1, with 'ppo' or 'gspo'")
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}; expected one of {ESTIMATORS}")
    if kl_coef and kl_estimator == "k1":
        raise ValueError(
            f"kl_estimator is 'k1' with kl_coef = {kl_coef}: as a loss term k1 has expected gradient 0. "
            "Use 'k2' or 'k3', or subtract the detached k1 from the reward"
        )
    if tis_cap is not None and not tis_cap > 0:
        raise ValueError(f"tis_cap is {tis_cap}; expected a positive cap")
    if icepop_band is not None and not 0 <= icepop_band[0] < icepop_band[1]:
        raise ValueError(f"icepop_band is {icepop_band}; expected (low, high) with 0 <= low < high")
    if correction_level not in ("token", "sequence"):
        raise ValueError(f"tis_level is {correction_level!r}; expected 'token' or 'sequence'")
    check_aggregation(aggregation, denominator)
