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

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.losses import policy_loss
from irlfast.ops import kl_estimate, sequence_logprobs, token_stats

from .packing import IGNORED, Parallel, local_values, packed_labels, response_spans, response_values
from .tis import tis

Reducer = Callable[[Tensor], Tensor]


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
            calculate_per_token_loss, use_opsm, opsm_delta, rollout_temperature, and the sizes of parallelism.
        batch: unconcat_tokens (of each sample [total_length]), total_lengths, response_lengths, loss_masks (each
            [response_length]), and of each sample a number a response token of this rank: advantages, log_probs,
            rollout_log_probs, ref_log_probs, the last three where slime made them.
        logits: packed, before the temperature, in any floating type; with tensor parallelism this rank's columns.
        sum_of_sample_mean: [N] one number a response token -> 0-d; linear.

    Returns:
        The loss, 0-d, and detached 0-d metrics under the names of slime's policy_loss.

    Raises:
        NotImplementedError: --rollout-top-p other than 1; --allgather-cp; gspo, --use-opsm or a TIS that rejects
            tokens, with context parallelism where each needs whole responses.
        ValueError: shapes that do not fit together, or something that the options need and the batch lacks.
    """
    parallel = Parallel.of(args)
    estimator = getattr(args, "advantage_estimator", "grpo")
    use_opsm = getattr(args, "use_opsm", False)
    _refuse(args, logits, estimator, use_opsm, parallel)
    spans, rows = response_spans(batch["total_lengths"], batch["response_lengths"], parallel)
    if logits.shape[1] < rows:
        raise ValueError(f"logits has {logits.shape[1]} rows; total_lengths says that the samples take {rows}")
    labels = packed_labels(spans, batch["unconcat_tokens"], logits.shape[1], logits.device)
    temperature = float(getattr(args, "rollout_temperature", 1.0))
    stats = token_stats(logits[0], labels, temperature=temperature, ignore_index=IGNORED, group=parallel.vocab_group)
    current = response_values(stats.logprob, spans)
    logprob, entropy = torch.cat(current), torch.cat(response_values(stats.entropy, spans))
    detached = [values.detach() for values in current]
    old = _per_token(batch, "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs")
    if old is None:
        old = torch.cat(detached)
    advantages = _required(batch, "advantages", "a policy loss")
    for name, values in (("advantages", advantages), ("log-probs of the old policy", old)):
        if values.shape != logprob.shape:
            raise ValueError(f"{len(values)} {name} for {len(logprob)} response tokens of this rank")

    weights = reducer_weights(sum_of_sample_mean, logprob)
    kept, factor = weights, torch.ones_like(weights)
    log: dict[str, Tensor] = {}
    gap = old - logprob.detach()
    sequence_gap = None
    if use_opsm or estimator == "gspo":
        sequence_gap = _sequence_means(gap, batch)
    if use_opsm:
        assert sequence_gap is not None
        dropped = ((advantages < 0) & (sequence_gap > args.opsm_delta)).to(weights.dtype)
        factor = factor * (1 - dropped)
        counts = [mask.sum().clamp(min=1) for mask in batch["loss_masks"]]
        parts = dropped.split(list(batch["response_lengths"]))
        log["opsm_clipfrac"] = sum((p.sum() / n for p, n in zip(parts, counts, strict=True)), weights.new_zeros(()))
    masks: Sequence[Tensor] = batch["loss_masks"]
    corrections: Mapping[str, Tensor] = {}
    corrects = getattr(args, "use_tis", False) or getattr(args, "get_mismatch_metrics", False)
    if corrects:
        _required(batch, "rollout_log_probs", "--use-tis")
        path = getattr(args, "custom_tis_function_path", None)
        factor, masks, corrections = (load_function(path) if path else tis)(
            args=args,
            pg_loss=factor,
            train_log_probs=batch.get("log_probs") or detached,
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=batch["loss_masks"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
        )
        if masks is not batch["loss_masks"]:
            prompts = [t - r for t, r in zip(batch["total_lengths"], batch["response_lengths"], strict=True)]
            local = zip(masks, spans, prompts, strict=True)
            kept = weights * torch.cat([local_values(mask, span, prompt) for mask, span, prompt in local])
    policy_weights = kept
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    if path:
        per_token_loss = getattr(args, "calculate_per_token_loss", False)
        reducer = load_function(path)(batch["total_lengths"], batch["response_lengths"], masks, per_token_loss)
        policy_weights = reducer_weights(reducer, logprob)

    log_ratio = -gap if sequence_gap is None or estimator != "gspo" else -sequence_gap
    low, high = min(args.eps_clip, 1.0), getattr(args, "eps_clip_high", None)
    high = args.eps_clip if high is None else high
    ratio = log_ratio.exp()
    clamped = ratio.clamp(1 - low, 1 + high)
    weighted = advantages * factor * policy_weights
    if estimator == "cispo":
        weighted, clipped = weighted * clamped, clamped != ratio
        policy = policy_loss(logprob[None], weighted[None], kind="token", aggregation="token_sum").loss
    else:
        clipped = (ratio - clamped) * advantages > 0
        policy = _clipped(args, batch, logprob, weighted, weights, old, estimator, (low, high))
    # Without a response token on this rank the graph still has to reach the logits.
    total = policy + stats.logprob.sum() * 0 if not len(logprob) else policy
    entropy_loss = kept @ entropy
    total = total - getattr(args, "entropy_coef", 0.0) * entropy_loss
    if getattr(args, "use_kl_loss", False):
        kl = _kl(args, logprob, old, _required(batch, "ref_log_probs", "--use-kl-loss"))
        log["kl_loss"] = kept @ kl
        total = total + args.kl_loss_coef * log["kl_loss"]

    log |= {
        "loss": total,
        "pg_loss": policy,
        "entropy_loss": entropy_loss,
        "pg_clipfrac": kept @ clipped.to(kept.dtype),
        "ppo_kl": -(kept @ log_ratio),
    }
    if batch.get("rollout_log_probs"):
        compared = logprob.detach() if getattr(args, "use_rollout_logprobs", False) else old
        log["train_rollout_logprob_abs_diff"] = kept @ (compared - torch.cat(batch["rollout_log_probs"])).abs()
    if corrects:
        log["ois"] = weights @ ratio
        log |= {name: weights @ values for name, values in corrections.items()}
    if batch.get("opd_reverse_kl"):
        log["opd_reverse_kl"] = kept @ torch.cat(batch["opd_reverse_kl"])
    return total, {name: value.detach().clone() for name, value in log.items()}


def reducer_weights(reduce: Reducer, like: Tensor) -> Tensor:
    """[N] what a linear reduction of [N] to a number multiplies each entry by: its gradient."""
    # Inside a checkpoint, whose hooks would run the whole loss again for it, the tensors are kept as they are.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        entries = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(entries), entries)
    return weights


def load_function(path: str) -> Any:
    """What a dotted path names, as slime reads it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _refuse(args: Any, logits: Tensor, estimator: str, use_opsm: bool, parallel: Parallel) -> None:
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [1, T, V], packed")
    top_p = getattr(args, "rollout_top_p", 1.0)
    if top_p != 1.0:
        raise NotImplementedError(
            f"rollout_top_p is {top_p}: irlfast's loss does not renormalise over the sampled nucleus. Use "
            "--rollout-top-p 1, or --loss-type policy_loss"
        )
    whole = "--use-opsm" if use_opsm else "advantage_estimator gspo" if estimator == "gspo" else None
    if parallel.context_size > 1 and whole:
        raise NotImplementedError(
            f"{whole} needs whole responses, which context_parallel_size = {parallel.context_size} spreads over ranks: "
            "use a size of 1, or --loss-type policy_loss"
        )


def _per_token(batch: Mapping[str, Any], name: str) -> Tensor | None:
    values = batch.get(name)
    return torch.cat(list(values)) if values else None


def _required(batch: Mapping[str, Any], name: str, by: str) -> Tensor:
    values = _per_token(batch, name)
    if values is None:
        raise ValueError(f"the batch has no {name}, which {by} needs")
    return values


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
    logprob: Tensor,
    weighted: Tensor,
    weights: Tensor,
    old: Tensor,
    estimator: str,
    clip: tuple[float, float],
) -> Tensor:
    """The sum over tokens of the clipped terms, by each token's ratio or by its response's."""
    dual_clip = getattr(args, "eps_clip_c", None)
    if estimator == "gspo":
        # An empty response changes nothing, and one advantage a token could be taken for one a response.
        lengths = [length for length in batch["response_lengths"] if length]
        return policy_loss(
            logprob,
            weighted,
            torch.cat(list(batch["loss_masks"])),
            kind="gspo",
            old_logprobs=old,
            clip=clip,
            dual_clip=dual_clip,
            aggregation="token_sum",
            cu_seqlens=_offsets(lengths, logprob.device),
        ).loss
    return policy_loss(
        logprob[None],
        weighted[None],
        (weights != 0)[None],
        kind="ppo",
        old_logprobs=old[None],
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
