"""slime's policy loss on fused ops: one pass over the logits for log-probs and entropy, one over the tokens after it.

With S the reduction that slime hands in, which weights token t by w_t (its mask over the tokens of its rollout; over 1
with --calculate-per-token-loss), the loss is

    S(pg) - entropy_coef S(H) + kl_loss_coef S(kl)

    pg    grpo, ppo, reinforce_plus_plus and its baseline: `losses.policy_loss`'s "ppo", with dual clip eps_clip_c;
          gspo: its "gspo"; cispo: -stopgrad(clip(rho, 1 - eps_clip, 1 + eps_clip_high)) A logp
    kl    by kl_loss_type, times rho with --use-unbiased-kl

Those are the numbers of slime's own policy_loss, and so are the metrics. A policy term is proportional to its advantage
for factors of at least 0, so the weights, the TIS correction and the off-policy sequence mask all go into the
advantage, and the fused loss is a plain sum. Rows of logits that predict no response token cost neither arithmetic nor
gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.losses import policy_loss
from irlfast.ops import kl_estimate, sequence_logprobs, token_stats

from .packing import IGNORED, Parallel, Span, packed_labels, response_spans, response_values
from .weights import Reducer, per_token, required, token_weights


def loss(
    args: Any,
    batch: Mapping[str, Any],
    logits: Tensor,  # (1, T, V)
    sum_of_sample_mean: Reducer,
) -> tuple[Tensor, dict[str, Tensor]]:
    """--loss-type custom_loss --custom-loss-function-path irlfast.integrations.slime.loss.

    Args:
        args: slime's. Read are advantage_estimator, eps_clip, eps_clip_high, eps_clip_c, entropy_coef, use_kl_loss,
            kl_loss_coef, kl_loss_type, use_unbiased_kl, use_rollout_logprobs, use_tis, get_mismatch_metrics, tis_clip,
            tis_clip_low, custom_tis_function_path (by default `tis`), custom_pg_loss_reducer_function_path,
            calculate_per_token_loss, use_opsm, opsm_delta, rollout_temperature, and the sizes of parallelism; and
            irlfast_inplace_backward, true to write the logits' gradient over the logits (see `ops.token_stats`).
        batch: unconcat_tokens (of each sample [total_length]), total_lengths, response_lengths, loss_masks (each
            [response_length]), and of each sample a number a response token of this rank: advantages, log_probs,
            rollout_log_probs, ref_log_probs, the last three where slime made them.
        logits: packed, before the temperature, in any floating type; with tensor parallelism this rank's columns.
        sum_of_sample_mean: [N] one number a response token -> 0-d; linear.

    Returns:
        The loss, 0-d, and detached 0-d metrics under the names of slime's policy_loss.

    Raises:
        NotImplementedError: --rollout-top-p other than 1; with context parallelism --allgather-cp, and gspo or
            --use-opsm, which need whole responses.
        ValueError: shapes that do not fit together, or something that the options need and the batch lacks.
    """
    parallel = Parallel.of(args)
    estimator = getattr(args, "advantage_estimator", "grpo")
    _refuse(args, logits, estimator, parallel)
    tokens = _tokens(args, batch, logits, parallel)
    gap = tokens.old - tokens.logprob.detach()
    means = _sequence_means(gap, batch) if estimator == "gspo" or getattr(args, "use_opsm", False) else None
    weights = token_weights(args, batch, tokens.samples, tokens.spans, tokens.advantages, means, sum_of_sample_mean)

    log_ratio = -gap if means is None or estimator != "gspo" else -means
    low, high = min(args.eps_clip, 1.0), getattr(args, "eps_clip_high", None)
    high = args.eps_clip if high is None else high
    ratio = log_ratio.exp()
    clamped = ratio.clamp(1 - low, 1 + high)
    weighted = tokens.advantages * weights.policy
    if estimator == "cispo":
        weighted, clipped = weighted * clamped, clamped != ratio
        policy = policy_loss(tokens.logprob[None], weighted[None], kind="token", aggregation="token_sum").loss
    else:
        clipped = (ratio - clamped) * tokens.advantages > 0
        policy = _clipped(args, batch, tokens, weighted, weights.whole, estimator, (low, high))
    entropy = weights.kept @ tokens.entropy
    # On a rank without response tokens the graph still has to reach the logits.
    total = policy - getattr(args, "entropy_coef", 0.0) * entropy + tokens.nothing
    log = {"pg_loss": policy, "entropy_loss": entropy, **weights.log}
    if getattr(args, "use_kl_loss", False):
        ref = required(batch, "ref_log_probs", "--use-kl-loss")
        log["kl_loss"] = weights.kept @ _kl(args, tokens.logprob, tokens.old, ref)
        total = total + args.kl_loss_coef * log["kl_loss"]
    log |= {
        "loss": total,
        "pg_clipfrac": weights.kept @ clipped.to(ratio.dtype),
        "ppo_kl": -(weights.kept @ log_ratio),
    }
    if (sampled := per_token(batch, "rollout_log_probs")) is not None:
        compared = tokens.logprob.detach() if getattr(args, "use_rollout_logprobs", False) else tokens.old
        log["train_rollout_logprob_abs_diff"] = weights.kept @ (compared - sampled).abs()
    if weights.corrected:
        log["ois"] = weights.whole @ ratio
    if (distilled := per_token(batch, "opd_reverse_kl")) is not None:
        log["opd_reverse_kl"] = weights.kept @ distilled
    return total, {name: value.detach().clone() for name, value in log.items()}


class _Tokens(NamedTuple):
    """Of this rank's N response tokens, sample after sample.

    logprob, entropy: [N], with gradient. samples: the log-probs of each sample, without. old, advantages: [N]. spans:
    see `packing`. nothing: 0, and where N is 0 the way to the logits.
    """

    logprob: Tensor
    entropy: Tensor
    samples: list[Tensor]
    old: Tensor
    advantages: Tensor
    spans: list[list[Span]]
    nothing: Tensor | float


def _tokens(args: Any, batch: Mapping[str, Any], logits: Tensor, parallel: Parallel) -> _Tokens:
    spans, rows = response_spans(batch["total_lengths"], batch["response_lengths"], parallel)
    if logits.shape[1] < rows:
        raise ValueError(f"logits has {logits.shape[1]} rows; total_lengths says that the samples take {rows}")
    stats = token_stats(
        logits.squeeze(0),  # whose gradient is a view; that of logits[0] would be copied into zeros
        packed_labels(spans, batch["unconcat_tokens"], logits.shape[1], logits.device),
        temperature=float(getattr(args, "rollout_temperature", 1.0)),
        ignore_index=IGNORED,
        inplace_backward=bool(getattr(args, "irlfast_inplace_backward", False)),
        group=parallel.vocab_group,
    )
    current = response_values(stats.logprob, spans)
    logprob = torch.cat(current)
    old = per_token(batch, "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs")
    old = logprob.detach() if old is None else old
    advantages = required(batch, "advantages", "a policy loss")
    for name, values in (("advantages", advantages), ("log-probs of the old policy", old)):
        if values.shape != logprob.shape:
            raise ValueError(f"{len(values)} {name} for {len(logprob)} response tokens of this rank")
    return _Tokens(
        logprob=logprob,
        entropy=torch.cat(response_values(stats.entropy, spans)),
        samples=[values.detach() for values in current],
        old=old,
        advantages=advantages,
        spans=spans,
        nothing=0.0 if len(logprob) else stats.logprob.sum(),
    )


def _refuse(args: Any, logits: Tensor, estimator: str, parallel: Parallel) -> None:
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [1, T, V], packed")
    top_p = getattr(args, "rollout_top_p", 1.0)
    if top_p != 1.0:
        raise NotImplementedError(
            f"rollout_top_p is {top_p}: irlfast's loss does not renormalise over the sampled nucleus. Use "
            "--rollout-top-p 1, or --loss-type policy_loss"
        )
    whole = (
        "--use-opsm"
        if getattr(args, "use_opsm", False)
        else "advantage_estimator gspo"
        if estimator == "gspo"
        else None
    )
    if parallel.context_size > 1 and whole:
        raise NotImplementedError(
            f"{whole} needs whole responses, which context_parallel_size = {parallel.context_size} spreads over ranks: "
            "use a size of 1, or --loss-type policy_loss"
        )


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def _sequence_means(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[N] at each token the mean over its response's tokens that count."""
    lengths = batch["response_lengths"]
    mask = torch.cat(list(batch["loss_masks"]))
    means = sequence_logprobs(values, mask, cu_seqlens=_offsets(lengths, values.device), reduction="mean")
    return means.repeat_interleave(torch.tensor(lengths, device=values.device), output_size=len(values))


def _clipped(
    args: Any,
    batch: Mapping[str, Any],
    tokens: _Tokens,
    weighted: Tensor,
    weights: Tensor,
    estimator: str,
    clip: tuple[float, float],
) -> Tensor:
    """The sum over tokens of the clipped terms, by each token's ratio or by its response's."""
    dual_clip = getattr(args, "eps_clip_c", None)
    if estimator == "gspo":
        # An empty response changes nothing, and one advantage a token could be taken for one a response.
        lengths = [length for length in batch["response_lengths"] if length]
        return policy_loss(
            tokens.logprob,
            weighted,
            torch.cat(list(batch["loss_masks"])),
            kind="gspo",
            old_logprobs=tokens.old,
            clip=clip,
            dual_clip=dual_clip,
            aggregation="token_sum",
            cu_seqlens=_offsets(lengths, weighted.device),
        ).loss
    return policy_loss(
        tokens.logprob[None],
        weighted[None],
        (weights != 0)[None],
        kind="ppo",
        old_logprobs=tokens.old[None],
        clip=clip,
        dual_clip=dual_clip,
        aggregation="token_sum",
    ).loss


def _kl(args: Any, logprob: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """[N] the KL penalty's estimate at each token."""
    kind, unbiased = getattr(args, "kl_loss_type", "k1"), getattr(args, "use_unbiased_kl", False)
    if kind == "k1" and not unbiased:
        warnings.warn(
            "kl_loss_type is k1, whose expected gradient is 0: as a loss it adds noise and nothing else. Use "
            "--kl-loss-type k2, or --use-unbiased-kl",
            stacklevel=3,
        )
    estimator: Any = "k3" if kind == "low_var_kl" else kind
    kl = kl_estimate(logprob, ref, estimator=estimator)
    if unbiased:
        kl = kl * torch.exp(logprob - old)
    return kl.clamp(-10, 10) if kind == "low_var_kl" else kl
