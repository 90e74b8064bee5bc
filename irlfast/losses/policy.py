"""Policy-gradient losses on the log-probabilities of sampled tokens.

With rho_t = exp(logp_t - old_logp_t), A the advantage and m the response mask, the term of token t is

    reinforce   -A_t logp_t                                              one advantage a response, or one a token
    token       -A_t logp_t                                              one advantage a token
    ppo         -min(rho_t A_t, clip(rho_t, 1 - lo, 1 + hi) A_t)         Schulman et al. 2017
                and, with dual_clip = c, at least -c |A_t| where A_t < 0:  min(-c A_t, that), Ye et al. 2020

times min(exp(old_logp_t - rollout_logp_t), tis_cap) where the sampler's own log-probabilities are given (truncated
importance sampling: samplers and trainers round differently). A KL penalty and an entropy bonus are added token by
token, and `aggregation` makes one number of it all.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from irlfast.losses.aggregation import Aggregation, aggregate, masked, masked_mean
from irlfast.ops import kl_estimate
from irlfast.ops._segments import require_floating
from irlfast.ops.kl_estimate import ESTIMATORS

PolicyKind = Literal["reinforce", "token", "ppo"]
POLICY_KINDS: tuple[str, ...] = get_args(PolicyKind)

# exp overflows float32 past 88, and inf in the branch that min rejects still makes the gradient 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """loss: 0-d, to minimise. metrics: detached 0-d tensors by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,  # (B, T)
    advantages: Tensor,  # (B) or (B, T)
    mask: Tensor,  # (B, T)
    *,
    kind: PolicyKind,
    old_logprobs: Tensor | None = None,  # (B, T)
    ref_logprobs: Tensor | None = None,  # (B, T)
    rollout_logprobs: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k2",
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
    aggregation: Aggregation = "token_mean",
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Loss whose gradient step raises the likelihood of tokens with a positive advantage.

    Gradients pass to logprobs and entropy alone. What stands outside the mask, NaN and infinities included, has no
    influence and receives gradient 0; a batch without a single unmasked token has loss 0.

    Args:
        logprobs: [B, T] log pi of the tokens under the policy being trained.
        advantages: [B], one a response, or [B, T], one a token.
        mask: [B, T] non-zero on response tokens, EOS included.
        kind: "reinforce", "token" or "ppo".
        old_logprobs: [B, T] log-probs under the policy that the step started from. "ppo" needs them; elsewhere they
            stand for the current ones (detached) where they are missing.
        ref_logprobs: [B, T] under the reference policy; the KL is reported, and with kl_coef a part of the loss.
        rollout_logprobs: [B, T] as the sampler reported them; the gap is reported, and with tis_cap corrected for.
        entropy: [B, T] entropy of the policy at each token; reported, and with entropy_coef a bonus.
        clip: (lo, hi), the ratio's range [1 - lo, 1 + hi] of "ppo".
        dual_clip: c > 1, the bound on a negative advantage's loss in "ppo"; None for none.
        kl_coef: weight of the KL penalty.
        kl_estimator: "k2", whose gradient on samples of the policy is that of the reverse KL, or "k3", here times the
            differentiable ratio, which has the same (without it, it would be the forward KL's). "k1" has expected
            gradient 0 and is refused as a loss term: put it in the reward instead. It may be reported.
        entropy_coef: weight of the entropy bonus. A batch mean of -logp is no entropy to differentiate: its expected
            gradient is 0, as k1's. Give the exact entropy of each next-token distribution.
        tis_cap: C > 0, the cap on exp(old_logprobs - rollout_logprobs).
        aggregation: see `irlfast.losses.aggregation`.
        denominator: the global count, over all ranks and micro-batches, or the constant to divide by.

    Returns:
        PolicyLoss(loss, metrics). Metrics, over this batch's tokens: policy (the aggregated first term);
        approx_kl (k3 of old to new), ratio_min, ratio_max where old_logprobs is given; clip_fraction (tokens whose
        gradient the clip stopped) for ppo; kl and entropy (token means) where their inputs are given;
        rollout_gap, rollout_gap_max (mean and largest |old - rollout|) and with tis_cap tis_fraction (tokens capped).

    Raises:
        TypeError: a tensor that is not floating point. ValueError: shapes that do not fit, an input that the chosen
        kind or coefficient needs and did not get, or an option outside its range.
    """
    _check_shapes(logprobs, advantages, mask, old_logprobs, ref_logprobs, rollout_logprobs, entropy)
    _check_options(kind, advantages, clip, dual_clip, kl_coef, kl_estimator, tis_cap)
    for needed_by, asked, name, given in (
        ("kind 'ppo'", kind == "ppo", "old_logprobs", old_logprobs),
        (f"kl_coef = {kl_coef}", kl_coef != 0, "ref_logprobs", ref_logprobs),
        (f"entropy_coef = {entropy_coef}", entropy_coef != 0, "entropy", entropy),
        (f"tis_cap = {tis_cap}", tis_cap is not None, "rollout_logprobs", rollout_logprobs),
    ):
        if asked and given is None:
            raise ValueError(f"{needed_by} needs {name}, which was not given")

    mask = mask.bool()
    logp = masked(logprobs, mask)
    advantage = masked((advantages[:, None] if advantages.dim() == 1 else advantages).detach().expand_as(logp), mask)
    old = logp.detach() if old_logprobs is None else masked(old_logprobs.detach(), mask)
    log_ratio = (logp - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = torch.exp(log_ratio)
    metrics: dict[str, Tensor] = {}

    if kind == "ppo":
        terms, stopped = _ppo_terms(ratio, advantage, clip, dual_clip)
        metrics["clip_fraction"] = masked_mean((stopped & mask).to(logp.dtype), mask)
    else:
        terms = -advantage * logp
    if old_logprobs is not None:
        seen = ratio.detach()
        approx_kl = kl_estimate(old, logp.detach(), estimator="k3")
        metrics["approx_kl"] = masked_mean(approx_kl, mask)
        # Masked positions have ratio exactly 1; they may neither set nor hide the extremes of the others.
        empty = ~mask.any()
        if mask.numel():
            metrics["ratio_min"] = torch.where(empty, 1.0, torch.where(mask, seen, torch.inf).min())
            metrics["ratio_max"] = torch.where(empty, 1.0, torch.where(mask, seen, -torch.inf).max())
    if rollout_logprobs is not None:
        gap = old - masked(rollout_logprobs.detach(), mask)
        metrics["rollout_gap"] = masked_mean(gap.abs(), mask)
        if mask.numel():
            metrics["rollout_gap_max"] = gap.abs().max()
        if tis_cap is not None:
            correction = torch.exp(gap.clamp(max=MAX_LOG_RATIO))
            metrics["tis_fraction"] = masked_mean(((correction > tis_cap) & mask).to(logp.dtype), mask)
            terms = terms * correction.clamp(max=tis_cap)
    metrics["policy"] = aggregate(terms.detach(), mask, aggregation, denominator)

    if ref_logprobs is not None:
        kl = kl_estimate(logp, masked(ref_logprobs.detach(), mask), estimator=kl_estimator)
        metrics["kl"] = masked_mean(kl.detach(), mask)
        if kl_coef:
            terms = terms + kl_coef * (ratio * kl if kl_estimator == "k3" else kl)
    if entropy is not None:
        entropy = masked(entropy, mask)
        metrics["entropy"] = masked_mean(entropy.detach(), mask)
        if entropy_coef:
            terms = terms - entropy_coef * entropy
    return PolicyLoss(aggregate(terms, mask, aggregation, denominator), metrics)


def _ppo_terms(
    ratio: Tensor, advantage: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The clipped terms [B, T], and where [B, T] the clip has stopped the gradient."""
    plain = -ratio * advantage
    clipped = -ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
    terms, stopped = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantage
        beyond = (advantage < 0) & (terms > bound)
        terms, stopped = torch.where(beyond, bound, terms), stopped | beyond
    return terms, stopped.detach()


def _check_shapes(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> None:
    require_floating(logprobs=logprobs, advantages=advantages)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}; expected [B, T]")
    if advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; expected {tuple(logprobs.shape[:1])}, one a response, "
            f"or {tuple(logprobs.shape)}, one a token"
        )
    beside = {
        "mask": mask,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    for name, values in beside.items():
        if values is None:
            continue
        if name != "mask":
            require_floating(**{name: values})
        if values.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected that of logprobs, {tuple(logprobs.shape)}"
            )


def _check_options(
    kind: str,
    advantages: Tensor,
    clip: tuple[float, float],
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    tis_cap: float | None,
) -> None:
    if kind not in POLICY_KINDS:
        raise ValueError(f"kind is {kind!r}; this version has {POLICY_KINDS}")
    if kind == "token" and advantages.dim() != 2:
        raise ValueError("kind 'token' takes advantages [B, T], one a token; for one a response use 'reinforce'")
    if not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"clip is {clip}; expected (lo, hi) with lo in [0, 1] and hi at least 0")
    if dual_clip is not None and not (kind == "ppo" and dual_clip > 1):
        raise ValueError(f"dual_clip is {dual_clip} with kind {kind!r}; expected more than 1, with kind 'ppo'")
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator is {kl_estimator!r}; expected one of {ESTIMATORS}")
    if kl_coef and kl_estimator == "k1":
        raise ValueError(
            f"kl_estimator is 'k1' with kl_coef = {kl_coef}: as a loss term k1 has expected gradient 0. "
            "Use 'k2' or 'k3', or subtract the detached k1 from the reward"
        )
    if tis_cap is not None and not tis_cap > 0:
        raise ValueError(f"tis_cap is {tis_cap}; expected a positive cap")
