"""A micro-batch as slime packs it, and its policy loss written out token by token in float64."""

from __future__ import annotations

import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from irlfast.integrations.slime import loss

VOCAB = 12
# Prompt and response lengths: a response of one token, a prompt of one.
LENGTHS = ((3, 4), (1, 1), (5, 6), (2, 3))
PADDING = 5  # rows after the last sample, as slime pads to a multiple

# What slime 0.3.1 sets by default, of the arguments that its policy_loss reads.
DEFAULTS: dict[str, Any] = {
    "advantage_estimator": "grpo",
    "eps_clip": 0.2,
    "eps_clip_high": 0.2,
    "eps_clip_c": None,
    "entropy_coef": 0.0,
    "use_kl_loss": False,
    "kl_loss_coef": 0.0,
    "kl_loss_type": "k1",
    "use_unbiased_kl": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
    "get_mismatch_metrics": False,
    "tis_clip": 2.0,
    "tis_clip_low": 0,
    "custom_tis_function_path": None,
    "custom_pg_loss_reducer_function_path": None,
    "calculate_per_token_loss": False,
    "use_opsm": False,
    "opsm_delta": 1e-4,
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "log_probs_chunk_size": -1,
    "allgather_cp": False,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
}

KL = {"use_kl_loss": True, "kl_loss_coef": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "asymmetric dual clip": {"eps_clip": 0.1, "eps_clip_high": 0.28, "eps_clip_c": 1.5},
    "ppo, entropy, temperature": {"advantage_estimator": "ppo", "entropy_coef": 0.05, "rollout_temperature": 0.7},
    "kl k1 unbiased": {**KL, "kl_loss_type": "k1", "use_unbiased_kl": True},
    "kl k2": {**KL, "kl_loss_type": "k2"},
    "kl k3 unbiased": {**KL, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "kl low_var_kl": {**KL, "kl_loss_type": "low_var_kl", "entropy_coef": 0.01},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.1, "entropy_coef": 0.02},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 0.3},
    "cispo without lower bound": {"advantage_estimator": "cispo", "eps_clip": 1.5, "eps_clip_high": 0.1},
    "per token": {"calculate_per_token_loss": True, "entropy_coef": 0.05},
    "tis": {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": 0.8},
    "mismatch metrics": {"get_mismatch_metrics": True, **KL, "kl_loss_type": "k2"},
    "rollout log-probs": {"use_rollout_logprobs": True, "use_tis": True},
    "opsm": {"use_opsm": True, "use_tis": True},
}


def arguments(**changed: Any) -> Namespace:
    return Namespace(**{**DEFAULTS, **changed})


def micro_batch(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, vocab: int = VOCAB
) -> tuple[dict[str, Any], Tensor]:
    """The batch, and logits [1, T, V] that want a gradient."""
    torch.manual_seed(seed)
    totals, responses = [p + r for p, r in LENGTHS], [r for _, r in LENGTHS]
    logits = torch.randn(1, sum(totals) + PADDING, vocab, dtype=torch.float64) * 2
    tokens = [torch.randint(vocab, (total,)) for total in totals]
    masks = [torch.ones(r, dtype=torch.int) for r in responses]
    masks[2][1:3] = 0  # a tool's answer in the middle
    batch: dict[str, Any] = {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        # The last two samples are parts of one rollout.
        "rollout_mask_sums": [torch.tensor(n) for n in (4, 1, 7, 7)],
    }
    now, _ = per_token(logits[0], batch, 1.0)
    for name, spread in (("log_probs", 0.3), ("rollout_log_probs", 0.4), ("ref_log_probs", 0.8)):
        batch[name] = [(x + spread * torch.randn(len(x), dtype=torch.float64)).to(dtype) for x in now]
    batch["advantages"] = [
        torch.full((r,), a, dtype=dtype) for r, a in zip(responses, (1.5, -2.0, -0.7, 0.0), strict=True)
    ]
    batch["advantages"][3] = torch.tensor([0.4, -0.9, 1.1], dtype=dtype)  # of GAE: one a token
    return batch, logits.to(dtype).requires_grad_()


def per_token(logits: Tensor, batch: dict[str, Any], temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Log-prob and entropy of each sample's response tokens."""
    logprobs, entropies, start = [], [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        rows = (logits[start + total - response - 1 : start + total - 1] / temperature).log_softmax(-1)
        logprobs.append(rows[torch.arange(response), tokens[total - response :]])
        entropies.append(-(rows.exp() * rows).sum(-1))
        start += total
    return logprobs, entropies


def reducer(args: Namespace, batch: dict[str, Any], masks: list[Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """What slime hands a loss: the sum over samples of masked sums over their rollout's tokens; or of masked sums."""
    masks = batch["loss_masks"] if masks is None else masks

    def reduce(values: Tensor) -> Tensor:
        total = values.new_zeros(())
        parts = values.split(batch["response_lengths"])
        for part, mask, count in zip(parts, masks, batch["rollout_mask_sums"], strict=True):
            total = total + (part * mask).sum() / (1 if args.calculate_per_token_loss else count.clamp(min=1))
        return total

    return reduce


def written_out(args: Namespace, batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and metrics of slime 0.3.1's policy_loss from their formulas."""
    reduce, masks = reducer(args, batch), batch["loss_masks"]
    new, entropies = per_token(logits[0], batch, args.rollout_temperature)
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch["log_probs"]
    advantages = torch.cat(batch["advantages"])
    ratios, dropped = [], []
    for n, o, a, mask in zip(new, old, batch["advantages"], masks, strict=True):
        mean = ((n - o) * mask).sum() / mask.sum()
        ratios.append(mean.exp().expand(len(n)) if args.advantage_estimator == "gspo" else (n - o).exp())
        dropped.append(((a < 0) & (-mean > args.opsm_delta)).double())
    ratio, logprob = torch.cat(ratios), torch.cat(new)
    clamped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    if args.advantage_estimator == "cispo":
        terms, cut = -clamped.detach() * advantages * logprob, clamped != ratio
    else:
        terms, cut = (
            torch.maximum(-ratio * advantages, -clamped * advantages),
            -clamped * advantages > -ratio * advantages,
        )
        if args.eps_clip_c is not None:
            terms = torch.where(advantages < 0, torch.minimum(terms, -args.eps_clip_c * advantages), terms)
    metrics = {}
    if args.use_opsm:
        terms = terms * (1 - torch.cat(dropped))
        metrics["opsm_clipfrac"] = sum(d.sum() / m.sum() for d, m in zip(dropped, masks, strict=True))
    if args.use_tis or args.get_mismatch_metrics:
        sampled = torch.exp(torch.cat(batch["log_probs"]) - torch.cat(batch["rollout_log_probs"]))
        weight = sampled.clamp(args.tis_clip_low, args.tis_clip)
        terms = terms * weight
        metrics |= {"ois": reduce(ratio), "tis": reduce(sampled), "tis_abs": reduce((sampled - 1).abs())}
        metrics["tis_clipfrac"] = reduce((weight != sampled).double())
    entropy = reduce(torch.cat(entropies))
    loss = reduce(terms) - args.entropy_coef * entropy
    if args.use_kl_loss:
        d = logprob - torch.cat(batch["ref_log_probs"])
        kl = {"k1": d, "k2": d**2 / 2}.get(args.kl_loss_type, (-d).exp() - 1 + d)
        if args.use_unbiased_kl:
            kl = kl * (logprob - torch.cat(old)).exp()
        if args.kl_loss_type == "low_var_kl":
            kl = kl.clamp(-10, 10)
        metrics["kl_loss"] = reduce(kl)
        loss = loss + args.kl_loss_coef * metrics["kl_loss"]
    compared = logprob if args.use_rollout_logprobs else torch.cat(old)
    return loss, metrics | {
        "loss": loss,
        "pg_loss": reduce(terms),
        "entropy_loss": entropy,
        "pg_clipfrac": reduce(cut.double()),
        "ppo_kl": reduce(-ratio.log()),
        "train_rollout_logprob_abs_diff": reduce((compared - torch.cat(batch["rollout_log_probs"])).abs()),
    }


def slimes_loss(checkout: Path) -> types.ModuleType:
    """slime's loss.py, whose package asks for GPUs and Megatron, over a Megatron that has one rank."""
    mpu = types.ModuleType("megatron.core.mpu")
    mpu.get_context_parallel_world_size = lambda: 1
    mpu.get_tensor_model_parallel_group = mpu.get_context_parallel_group = lambda: None
    core, megatron = types.ModuleType("megatron.core"), types.ModuleType("megatron")
    core.mpu = mpu
    backends = types.ModuleType("slime.backends.megatron_utils")
    backends.__path__ = [str(checkout / "slime/backends/megatron_utils")]
    httpx = types.ModuleType("httpx")  # slime's HTTP helpers name it in annotations
    httpx.AsyncClient = object
    stubs = {"megatron": megatron, "megatron.core": core, "megatron.core.mpu": mpu, "httpx": httpx}
    with (
        patch.dict(sys.modules, {**stubs, backends.__name__: backends}),
        patch.object(sys, "path", [str(checkout), *sys.path]),
        patch.object(torch, "compile", lambda **options: lambda function: function),
    ):
        return importlib.import_module("slime.backends.megatron_utils.loss")


def compare(theirs: types.ModuleType, name: str) -> dict[str, float]:
    """The largest differences to slime's own policy_loss for a case, in float32: of the loss, gradient and metrics."""
    args = arguments(**CASES[name])
    batch, logits = micro_batch(torch.float32)
    lengths = (batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], batch["rollout_mask_sums"])
    reduce = theirs.get_sum_of_sample_mean(*lengths, args.calculate_per_token_loss)
    expected, expected_metrics = theirs.policy_loss_function(args, batch, logits, reduce)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    value, metrics = loss(args, batch, logits, reduce)
    (gradient,) = torch.autograd.grad(value, logits)
    if set(metrics) != set(expected_metrics):
        raise AssertionError(f"{name}: metrics {sorted(metrics)}; slime has {sorted(expected_metrics)}")
    return {
        "loss": float((value - expected).detach().abs()),
        "gradient": float((gradient - expected_gradient).abs().max()),
        "metrics": max(float((metrics[key] - number).abs()) for key, number in expected_metrics.items()),
    }
