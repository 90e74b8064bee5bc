"""One call from a causal language model and rewards to a policy loss: `compute_rl_loss`.

With A the advantages, rho_t = exp(logp_t - old_logp_t), d_t = logp_t - ref_logp_t, sums over the response's tokens:

    reinforce   -A sum_t logp_t                                            Williams 1992
    kl          reinforce + kl_coef sum_t d_t sg(sum_{t' >= t} d_t')       sg: no gradient passes
    ppo         -min(rho_t A, clip(rho_t, 1 - c, 1 + c) A)                 Schulman et al. 2017
    token       -sum_t A_t logp_t                                          one advantage a token

minus ent_coef times the entropy of each response token's distribution. The first, second and fourth are averaged over
responses, ppo over tokens (`aggregation`).

On samples of the model, the KL term's expected gradient is that of KL(pi(y|x) || ref(y|x)) over whole responses:
grad E[sum_t d_t] = E[sum_t grad logp_t sum_{t' >= t} d_t'], for what came before t does not depend on token t. The
sum of d_t itself (k1) has expected gradient 0, and sum_t d_t^2 / 2 (k2 of each token) leaves out what a token does to
the divergence after it. The term is at least 0, and 0 where the two models agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from irlfast import ops
from irlfast.causal_lm import Path, causal_lm_token_stats, unwrap
from irlfast.losses.advantages import whiten
from irlfast.losses.aggregation import Aggregation, aggregate, masked_mean
from irlfast.losses.policy import policy_loss
from irlfast.losses.response import ResponseBatch, response_batch
from irlfast.ops.policy_terms import MAX_LOG_RATIO

Mode = Literal["reinforce", "kl", "ppo", "token"]
MODES: tuple[str, ...] = get_args(Mode)


class RLLoss(NamedTuple):
    """loss: 0-d, to minimise. stats: detached 0-d tensors by name."""

    loss: Tensor
    stats: dict[str, Tensor]


def compute_rl_loss(
    model: nn.Module,
    enc_input_ids: Tensor,  # (B, T) or (T)
    prompt_len: int | Sequence[int] | Tensor,
    rewards: float | Sequence[float] | Tensor,  # (B); mode "token": (B, T) or (B, R)
    mode: Mode = "reinforce",
    ref_model: nn.Module | None = None,
    old_logprobs: Tensor | None = None,  # (B, T) or (B, R)
    kl_coef: float = 0.1,
    cliprange: float = 0.2,
    ent_coef: float = 0.0,
    normalize_adv: bool = True,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    temperature: float = 1.0,
    aggregation: Aggregation | None = None,
    denominator: float | Tensor | None = None,
    path: Path = "auto",
) -> RLLoss:
    """Policy-gradient loss of sampled responses; see the module for each mode's formula.

    Only response tokens count, EOS included: in the loss, the entropy, the whitening and every statistic. A row without
    one contributes nothing and is not counted; a batch without one has loss 0. Gradients pass to `model` alone.

    Args:
        model: see `irlfast.causal_lm.causal_lm_token_stats`, called once.
        enc_input_ids: [B, T] prompts and the responses sampled for them, or [T] for one.
        prompt_len: the number of prompt tokens, padding not counted: one number for all rows, or one a row.
        rewards: [B], one a response (a number will do for one row). For mode "token" one a token, [B, T] with entry t
            at token t or [B, R] over each response's own tokens (R the longest one's length): these are the advantages
            themselves, so sum them to the end, or subtract a critic's values, beforehand.
        mode: "reinforce", "kl", "ppo" or "token".
        ref_model: the reference; mode "kl" needs it, the others only report kl_mean. It runs once, without gradient, in
            the mode (training or evaluation) that it is in.
        old_logprobs: log-probs of the tokens under the policy that sampled them, shaped as the rewards of "token";
            `response_logprobs` computes them. Mode "ppo" needs them, the others only report ratio_mean.
        kl_coef: weight of the KL term of mode "kl".
        cliprange: c of mode "ppo".
        ent_coef: weight of the entropy bonus, aggregated over the response tokens as the mode's own terms are.
        normalize_adv: bring the advantages to mean 0 and standard deviation 1, over responses or, in mode "token", over
            response tokens. Equal rewards give advantage 0, and so does a single one, with a warning: switch this off
            there, and where the batch is one micro-batch of several.
        attention_mask: [B, T], non-zero on real tokens; padding may stand on either side of a row.
        pad_token_id: where there is no attention_mask: leading and trailing tokens with this id are padding. Refused if
            it is also one of the model's EOS ids.
        temperature: that of the sampler, for all models.
        aggregation: see `irlfast.losses.aggregation`; by default "token_mean" for ppo, else "seq_mean_token_sum".
        denominator: the whole batch's count of responses (or of tokens for "token_mean") where this is one micro-batch
            of it: then the parts' losses add up to the whole one's. The statistics stay this part's own.
        path: "hidden" never computes the logits as a whole, "logits" does, "auto" takes the first where it can.

    Returns:
        RLLoss(loss, stats), the statistics over non-empty responses:

        - mean_reward: of the raw rewards; in mode "token" of each response's sum.
        - mean_seq_logprob: of each response's log-prob, summed over its tokens, in nats.
        - mean_resp_logprob: per response token, in nats.
        - entropy: per response token, in nats.
        - kl_mean (where ref_model is given): of sum_t d_t, an unbiased estimate of KL(pi(y|x) || ref(y|x)), in nats. It
          may be negative.
        - ratio_mean (where old_logprobs are given): per response token; exactly 1 on the first step.
        - clip_fraction (ppo): response tokens whose gradient the clip stopped.

    A naive version differs where its numbers are wrong: it whitens one reward to NaN; takes one prompt length for all
    rows; counts prompt and padding in the entropy; and adds the mean log-ratio (k1) as KL, whose gradient is noise.

    Raises:
        ValueError: a mode without the input it needs, shapes that do not fit, prompt lengths outside [1, T), a reward
            that is not finite, options outside their range. IndexError: a response token outside the vocabulary.
    """
    _check_options(mode, ref_model, old_logprobs, kl_coef, cliprange)
    batch = response_batch(
        enc_input_ids,
        prompt_len,
        attention_mask=attention_mask,
        pad_token_id=pad_token_id,
        eos_token_ids=_eos_token_ids(model),
    )
    mask = batch.response_mask
    reward, advantages = _advantages(batch, rewards, mode, normalize_adv)
    if aggregation is None:
        aggregation = "token_mean" if mode == "ppo" else "seq_mean_token_sum"
    old = None if old_logprobs is None else batch.per_token("old_logprobs", old_logprobs.detach())

    logprobs, entropy, _ = _token_stats(model, batch, temperature, path)
    loss, metrics = policy_loss(
        logprobs,
        advantages.to(logprobs.dtype),
        mask,
        kind="reinforce" if mode == "kl" else mode,
        old_logprobs=old,
        entropy=entropy,
        entropy_coef=ent_coef,
        clip=(cliprange, cliprange),
        aggregation=aggregation,
        denominator=denominator,
    )
    responses = mask.any(dim=1)
    seen = logprobs.detach()
    stats = {
        "mean_reward": masked_mean(torch.where(responses, reward, 0.0), responses),
        "mean_seq_logprob": masked_mean(ops.sequence_logprobs(seen, mask), responses),
        "mean_resp_logprob": masked_mean(seen, mask),
        "entropy": metrics["entropy"],
    }
    if ref_model is not None:
        with torch.no_grad():
            ref_logprobs = _token_stats(ref_model, batch, temperature, path).logprob
        log_ratio = torch.where(mask, logprobs - ref_logprobs, 0.0)
        stats["kl_mean"] = masked_mean(log_ratio.detach().sum(dim=1), responses)
        if mode == "kl":
            to_go = log_ratio.detach().flip(1).cumsum(dim=1).flip(1)
            loss = loss + kl_coef * aggregate(log_ratio * to_go, mask, aggregation, denominator)
    if old is not None:
        ratio = torch.exp((seen - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        stats["ratio_mean"] = masked_mean(torch.where(mask, ratio, 0.0), mask)
    if mode == "ppo":
        stats["clip_fraction"] = metrics["clip_fraction"]
    return RLLoss(loss, stats)


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    enc_input_ids: Tensor,  # (B, T) or (T)
    prompt_len: int | Sequence[int] | Tensor,
    *,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    temperature: float = 1.0,
    path: Path = "auto",
) -> Tensor:  # (B, T)
    """Log-probs of the response tokens, 0 elsewhere, without gradient: the `old_logprobs` of later ppo steps.

    Arguments and errors as for `compute_rl_loss`. Returns [B, T], entry t that of token t.
    """
    batch = response_batch(
        enc_input_ids,
        prompt_len,
        attention_mask=attention_mask,
        pad_token_id=pad_token_id,
        eos_token_ids=_eos_token_ids(model),
    )
    return _token_stats(model, batch, temperature, path).logprob


def _token_stats(model: nn.Module, batch: ResponseBatch, temperature: float, path: Path) -> ops.TokenStats:
    return causal_lm_token_stats(
        model,
        batch.input_ids,
        attention_mask=batch.attention_mask,
        token_mask=batch.response_mask,
        temperature=temperature,
        path=path,
    )


def _advantages(batch: ResponseBatch, rewards: Any, mode: str, normalize: bool) -> tuple[Tensor, Tensor]:
    """Each response's reward [B], and the advantages: [B], in mode "token" [B, T]."""
    mask, rows = batch.response_mask, len(batch.input_ids)
    rewards = torch.as_tensor(rewards, device=mask.device).detach()
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if mode == "token":
        rewards = batch.per_token("rewards of mode 'token'", rewards)
        counted = mask
    else:
        rewards = rewards.expand(1) if rewards.dim() == 0 and rows == 1 else rewards
        if rewards.shape != (rows,):
            raise ValueError(
                f"rewards has shape {tuple(rewards.shape)}; mode {mode!r} expects ({rows},), one a response; for one a "
                "token use mode 'token'"
            )
        counted = mask.any(dim=1)
    bad = counted & ~torch.isfinite(rewards)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"rewards{where} is {float(rewards[tuple(where)])}; every reward must be finite")
    advantages = rewards
    if normalize:
        if int(counted.sum()) == 1:
            warnings.warn(
                "normalize_adv=True on a single reward gives advantage 0, and so no policy gradient; pass "
                "normalize_adv=False to use the reward as it is, or more responses",
                stacklevel=3,
            )
        advantages = whiten(rewards, counted)
    return (rewards.sum(dim=1) if mode == "token" else rewards), advantages


def _check_options(
    mode: str, ref_model: nn.Module | None, old_logprobs: Tensor | None, kl_coef: float, cliprange: float
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {MODES}")
    if mode == "kl" and ref_model is None:
        raise ValueError("mode 'kl' needs ref_model, the model to stay close to, which was not given")
    if mode == "ppo" and old_logprobs is None:
        raise ValueError(
            "mode 'ppo' needs old_logprobs, which was not given: compute them with losses.response_logprobs before the "
            "first step on these samples"
        )
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef is {kl_coef}; expected at least 0")
    if not 0 <= cliprange <= 1:
        raise ValueError(f"cliprange is {cliprange}; expected a number in [0, 1]")


def _eos_token_ids(model: nn.Module) -> list[int]:
    config = getattr(unwrap(model), "config", None)
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
