"""What each response token counts for: slime's reduction, and the corrections that multiply the policy's term."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import Span, local_values
from .tis import tis

Reducer = Callable[[Tensor], Tensor]


class TokenWeights(NamedTuple):
    """[N] each.

    whole: of slime's reduction. kept: the same without the tokens that a correction rejected. policy: of the policy's
    term, corrections included. corrected: whether there was one. log: 0-d figures of the corrections.
    """

    whole: Tensor
    kept: Tensor
    policy: Tensor
    corrected: bool
    log: dict[str, Tensor]


def token_weights(
    args: Any,
    batch: Mapping[str, Any],
    samples: Sequence[Tensor],
    spans: Sequence[Sequence[Span]],
    advantages: Tensor,
    means: Tensor | None,
    reduce: Reducer,
) -> TokenWeights:
    """The weights of this rank's tokens.

    Args:
        args, batch: as for `loss`.
        samples: of each sample the log-probs now, for a batch without log_probs.
        spans: see `packing`.
        advantages: [N].
        means: [N] the mean of old - new over each token's response, which --use-opsm looks at.
        reduce: slime's sum_of_sample_mean.
    """
    whole = kept = reducer_weights(reduce, advantages)
    factor = torch.ones_like(whole)
    masks: Sequence[Tensor] = batch["loss_masks"]
    log: dict[str, Tensor] = {}
    if getattr(args, "use_opsm", False) and means is not None:
        dropped = ((advantages < 0) & (means > args.opsm_delta)).to(whole.dtype)
        factor = 1 - dropped
        parts = zip(dropped.split(list(batch["response_lengths"])), masks, strict=True)
        log["opsm_clipfrac"] = torch.stack([part.sum() / mask.sum().clamp(min=1) for part, mask in parts]).sum()
    corrects = getattr(args, "use_tis", False) or getattr(args, "get_mismatch_metrics", False)
    if corrects:
        required(batch, "rollout_log_probs", "--use-tis")
        path = getattr(args, "custom_tis_function_path", None)
        factor, masks, figures = (load_function(path) if path else tis)(
            args=args,
            pg_loss=factor,
            train_log_probs=batch.get("log_probs") or samples,
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=masks,
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
        )
        if masks is not batch["loss_masks"]:
            prompts = [t - r for t, r in zip(batch["total_lengths"], batch["response_lengths"], strict=True)]
            local = zip(masks, spans, prompts, strict=True)
            kept = whole * torch.cat([local_values(mask, span, prompt) for mask, span, prompt in local])
        # Of all tokens: a share of rejected ones among those that are left would be 0.
        log |= {name: whole @ values.to(whole.dtype) for name, values in figures.items()}
    policy = kept
    if path := getattr(args, "custom_pg_loss_reducer_function_path", None):
        per_token_loss = getattr(args, "calculate_per_token_loss", False)
        custom = load_function(path)(batch["total_lengths"], batch["response_lengths"], masks, per_token_loss)
        policy = reducer_weights(custom, advantages)
    return TokenWeights(whole=whole, kept=kept, policy=policy * factor, corrected=corrects, log=log)


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


def per_token(batch: Mapping[str, Any], name: str) -> Tensor | None:
    """[N] one number a response token, of all samples; None where the batch has none."""
    values = batch.get(name)
    return torch.cat(list(values)) if values else None


def required(batch: Mapping[str, Any], name: str, by: str) -> Tensor:
    """The same. ValueError: the batch has none."""
    values = per_token(batch, name)
    if values is None:
        raise ValueError(f"the batch has no {name}, which {by} needs")
    return values
