"""Offline imitation by inverse soft-Q learning, with a language model's logits as the soft Q-function.

With q_t the logit of token y_t, tau the temperature, and the soft value of the state s_t before it,

    V_t = tau logsumexp_v(logits_v / tau),    log pi_t = (q_t - V_t) / tau,    r_t = q_t - gamma V_{t+1}

V after EOS being 0, the reward is what makes q satisfy the soft Bellman equation. IQ-Learn (Garg et al. 2021, arXiv
2106.12142, equation 9, chi-squared regulariser) maximises E[r] - E[V - gamma V'] - E[r^2] / (4 alpha) on the
demonstrations' own transitions, where the value terms telescope; for language models (arXiv 2409.01369) that is

    L = mean_t (V_t - q_t) + lambda mean_t r_t^2 + lambda_kl mean_t KL_t,      lambda = 1 / (4 alpha)

V_t - q_t = -tau log pi_t: the negative log-likelihood where tau = 1. The gradient flows through V_{t+1}: it is the
gradient of L, where DQN-like methods stop it. Means are over the responses' tokens. With policy samples at a rate rho
(the online variant) the square is (1 - rho) its mean over demonstrations + rho its mean over samples: the sum of

    iq_learn_loss(demonstrations, lambda_td=(1 - rho) * lambda)
    iq_learn_loss(samples, likelihood=0, lambda_td=rho * lambda)

For gamma = tau = 1 the rewards of a finished response add up to log pi(y|x) + V(x): see docs/iq_learn.md.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from irlfast.losses.reward import RewardLoss
from irlfast.ops._aggregation import check_aggregation, masked
from irlfast.ops._segments import compute_dtype, require_floating
from irlfast.ops.kl_estimate import kl_estimate
from irlfast.ops.linear_policy_ref_stats import linear_policy_ref_stats
from irlfast.ops.linear_token_stats import linear_token_stats

Truncated = Literal["bootstrap", "drop"]
TRUNCATED: tuple[str, ...] = get_args(Truncated)
_IGNORE = -100


class IQRewards(NamedTuple):
    """What an IQ-trained model says of each token; all but `returns` are [B, T] and 0 outside the mask.

    rewards: r_t = q_t - gamma V_{t+1}. values: V_t. counted: bool, the tokens whose reward is known, all but the last
    of a truncated response where those are dropped. returns: [B], the sum of each response's rewards.
    """

    rewards: Tensor
    values: Tensor
    counted: Tensor
    returns: Tensor


def iq_learn_rewards(
    q: Tensor,  # (B, T)
    lse: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    ended: Tensor,  # (B)
    gamma: float = 1.0,
    temperature: float = 1.0,
    truncated: Truncated = "bootstrap",
) -> IQRewards:
    """Token rewards of responses, r_t = q_t - gamma V_{t+1}, from the statistics of their tokens.

    Args:
        q: [B, T] logit of the token at t.
        lse: [B, T] logsumexp(logits / temperature) of the distribution that the token at t was predicted by. For a
            truncated response that is bootstrapped it also holds, one place after the last token, that of the token to
            come. What stands elsewhere, NaN included, has no influence.
        mask: [B, T] non-zero on response tokens, which are adjacent in each row.
        ended: [B] bool, the response ended with EOS: the value after it is 0.
        gamma: discount, in [0, 1].
        temperature: tau > 0, that of `lse`.
        truncated: what is after the last token of a response that was cut off: "bootstrap" takes the model's own value
            there, "drop" leaves that token without a reward.

    Returns:
        IQRewards in float32 (float64 where an input is), differentiable in q and lse.

    Raises:
        TypeError: q or lse is not floating point. ValueError: shapes, gamma, temperature or `truncated`; on the CPU
            also a mask with a gap, or a truncated response whose last token is in the last column although it is to be
            bootstrapped (on a GPU, where looking would stall, its reward is NaN).
    """
    dtype = _check(q, lse, mask, ended, gamma, temperature, truncated)
    real = mask.bool()
    last = _last_tokens(real)
    cut = last & ~ended.bool()[:, None]
    if real.is_cpu:
        _check_rows(real, last, cut, truncated)
    # NaN in the column that is not there: a value that somebody needs and nobody has must not pass for 0.
    following = torch.nn.functional.pad(lse.to(dtype)[:, 1:], (0, 1), value=torch.nan)
    known = real & ~last | cut if truncated == "bootstrap" else real & ~last
    next_values = temperature * torch.where(known, following, 0.0)
    counted = real & ~cut if truncated == "drop" else real
    rewards = torch.where(counted, masked(q, real).to(dtype) - gamma * next_values, 0.0)
    return IQRewards(rewards, temperature * masked(lse, real).to(dtype), counted, rewards.sum(dim=1))


def iq_learn_loss(
    q: Tensor,  # (B, T)
    lse: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    ended: Tensor,  # (B)
    gamma: float = 1.0,
    lambda_td: float = 0.1,
    temperature: float = 1.0,
    truncated: Truncated = "bootstrap",
    likelihood: float = 1.0,
    logprob: Tensor | None = None,  # (B, T)
    kl: Tensor | None = None,  # (B, T)
    lambda_kl: float = 0.0,
    denominator: float | Tensor | None = None,
) -> RewardLoss:
    """IQ-Learn's loss on the statistics of demonstrations' tokens, per response token.

    q, lse, mask, ended, gamma, temperature and truncated are as in `iq_learn_rewards`.

    Args:
        lambda_td: weight of r^2, 1 / (4 alpha), at least 0. With 0 the loss is that of supervised fine-tuning.
        likelihood: weight of V - q; 0 for policy samples, which nobody should imitate.
        logprob: [B, T] log pi of the tokens where it is known, which spares the rounding of q / tau - lse.
        kl: [B, T] divergence of each token's distribution from a reference (exact, or an estimate whose gradient is
            right: see `sampled_kl`), added with weight `lambda_kl`.
        denominator: number of response tokens to divide by in place of this batch's own, so that micro-batches add up
            to the batch they are part of. A dropped reward counts among them, as 0.

    Returns:
        RewardLoss(loss, metrics). Metrics: nll (nats a token), td_error (mean r^2), reward, reward_std, q, value
        and kl where given: means over the response tokens, a dropped reward counting as 0. A batch without response
        tokens has loss 0.

    Raises:
        As `iq_learn_rewards`; ValueError also for negative weights or a denominator that is not positive.
    """
    check_aggregation("token_mean", denominator)
    for name, weight in (("lambda_td", lambda_td), ("likelihood", likelihood), ("lambda_kl", lambda_kl)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} is {weight}; expected a weight of at least 0")
    if lambda_kl and kl is None:
        raise ValueError(
            f"lambda_kl is {lambda_kl} and kl is None; give the divergence of each token, or lambda_kl = 0"
        )
    for name, values in (("logprob", logprob), ("kl", kl)):
        if values is not None and values.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; expected that of q, {tuple(q.shape)}")
    rewards, value, _, _ = iq_learn_rewards(
        q, lse, mask, ended=ended, gamma=gamma, temperature=temperature, truncated=truncated
    )
    real = mask.bool()
    tokens = real.sum().clamp(min=1)
    # Masked before the difference, so that what stands on padding has no gradient either, not even NaN times 0.
    logp = masked(q, real) / temperature - masked(lse, real) if logprob is None else masked(logprob, real)
    terms = -likelihood * temperature * logp + lambda_td * rewards.square()
    divergence = None if kl is None else masked(kl, real)
    if divergence is not None and lambda_kl:
        terms = terms + lambda_kl * divergence
    loss = terms.sum() / (tokens if denominator is None else denominator)

    seen = rewards.detach()
    td_error, mean = seen.square().sum() / tokens, seen.sum() / tokens
    metrics = {
        "nll": -logp.detach().sum() / tokens,
        "td_error": td_error,
        "reward": mean,
        "reward_std": (td_error - mean.square()).clamp(min=0.0).sqrt(),
        "q": masked(q.detach(), real).sum() / tokens,
        "value": value.detach().sum() / tokens,
    }
    if divergence is not None:
        metrics["kl"] = divergence.detach().sum() / tokens
    return RewardLoss(loss, metrics)


def linear_iq_learn_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    ended: Tensor,  # (B)
    bias: Tensor | None = None,  # (V)
    gamma: float = 1.0,
    lambda_td: float = 0.1,
    temperature: float = 1.0,
    softcap: float | None = None,
    truncated: Truncated = "bootstrap",
    likelihood: float = 1.0,
    ref_hidden: Tensor | None = None,  # (B, T, D')
    ref_weight: Tensor | None = None,  # (V, D')
    ref_bias: Tensor | None = None,  # (V)
    lambda_kl: float = 0.0,
    denominator: float | Tensor | None = None,
    impl: str = "auto",
    **options: Any,
) -> RewardLoss:
    """`iq_learn_loss` from hidden states and the output head: the logits never exist whole, in neither pass.

    Args:
        hidden: [B, T, D], the state that predicts the label at t.
        weight: [V, D], the output head.
        labels: [B, T], the token that hidden[:, t] predicts, read where `mask` is non-zero.
        mask: [B, T], non-zero where the label is a response token.
        ended: [B] bool, the last of those labels is EOS. For a response that was cut off and is bootstrapped, the
            hidden state one place later, which has read its last token, must be there too.
        ref_hidden, ref_weight, ref_bias: the reference's; with them the exact reverse KL(pi || ref) of each token's
            distribution is measured, and added with weight `lambda_kl`.
        bias, softcap, impl, and as `options` mode, memory_budget and chunk: as in `ops.linear_token_stats` (with a
            reference: chunk alone, as in `ops.linear_policy_ref_stats`).

    gamma, lambda_td, temperature, truncated, likelihood and denominator are as in `iq_learn_loss`, and so are result
    and errors, besides those of the ops.
    """
    if mask.shape != labels.shape or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, labels {tuple(labels.shape)}, mask {tuple(mask.shape)}; expected "
            "[B, T, D], [B, T] and [B, T]"
        )
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight go together: give both, or neither")
    if lambda_kl and ref_hidden is None:
        raise ValueError(f"lambda_kl is {lambda_kl} without a reference: give ref_hidden and ref_weight")
    _check_shape("ended", ended, labels.shape[:1])
    wanted = torch.where(mask.bool(), labels, _IGNORE)
    if truncated == "bootstrap":
        # Its value is asked for, its token is not known: any label will do.
        wanted = torch.where(states_after(mask.bool(), ended), 0, wanted)
    head: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "impl": impl, **options}
    if ref_hidden is None or ref_weight is None:
        logprob, _, lse = linear_token_stats(hidden, weight, wanted, ignore_index=_IGNORE, **head)
        kl = None
    else:
        stats = linear_policy_ref_stats(
            hidden, weight, ref_hidden, ref_weight, wanted, ref_bias=ref_bias, ignore_index=_IGNORE, **head
        )
        logprob, lse, kl = stats.logprob, stats.lse, stats.reverse_kl
    return iq_learn_loss(
        temperature * (logprob + lse),
        lse,
        mask,
        ended=ended,
        gamma=gamma,
        lambda_td=lambda_td,
        temperature=temperature,
        truncated=truncated,
        likelihood=likelihood,
        logprob=logprob,
        kl=kl,
        lambda_kl=lambda_kl,
        denominator=denominator,
    )


def states_after(mask: Tensor, ended: Tensor) -> Tensor:
    """[B, T] bool: the place after the last response token of each row that did not end, where there is one.

    mask: [B, T] bool, adjacent in each row. ended: [B] bool.
    """
    cut = _last_tokens(mask) & ~ended.bool()[:, None]
    return torch.nn.functional.pad(cut[:, :-1], (1, 0))


def sampled_kl(logprob: Tensor, ref_logprob: Tensor, sampler_logprob: Tensor | None = None) -> Tensor:
    """KL(pi || ref) estimated on tokens that the policy sampled, ratio-corrected: its gradient is right, too.

        exp(logprob - sampler_logprob) (exp(-d) - 1 + d),      d = logprob - ref_logprob

    k3 alone has the gradient of the forward KL, and on demonstrations' tokens no estimator of this kind means anything:
    there d is the log-likelihood less a constant.

    Args:
        logprob, ref_logprob: log-probs of the sampled tokens, any one shape.
        sampler_logprob: the same under what sampled them; None is the policy as it is now.

    Returns:
        As logprob, float32 (float64 where an input is); differentiable in logprob.
    """

    sampler = logprob if sampler_logprob is None else sampler_logprob
    return torch.exp(logprob - sampler.detach()) * kl_estimate(logprob, ref_logprob.detach(), estimator="k3")


def _last_tokens(real: Tensor) -> Tensor:
    return real & ~torch.nn.functional.pad(real[:, 1:], (0, 1))


def _check_shape(name: str, values: Tensor, expected: torch.Size) -> None:
    if values.shape != expected:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {tuple(expected)}")


def _check(
    q: Tensor, lse: Tensor, mask: Tensor, ended: Tensor, gamma: float, temperature: float, truncated: str
) -> torch.dtype:
    """The dtype to compute in."""
    require_floating(q=q, lse=lse)
    if q.dim() != 2:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T], the logit of each token")
    _check_shape("lse", lse, q.shape)
    _check_shape("mask", mask, q.shape)
    _check_shape("ended", ended, q.shape[:1])
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; expected a discount in [0, 1]")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if truncated not in TRUNCATED:
        raise ValueError(f"truncated is {truncated!r}; expected one of {TRUNCATED}")
    return compute_dtype(q, lse)


def _check_rows(real: Tensor, last: Tensor, cut: Tensor, truncated: str) -> None:
    gaps = last.sum(dim=1) > 1
    if bool(gaps.any()):
        row = int(gaps.nonzero()[0])
        raise ValueError(f"mask[{row}] has a gap: the tokens of one response must be adjacent")
    if truncated == "bootstrap" and bool(cut[:, -1:].any()):
        row = int(cut[:, -1].nonzero()[0])
        raise ValueError(
            f"row {row} was cut off at the last of {real.shape[1]} columns: the value after it has no place; give one "
            "more column, or truncated='drop'"
        )
