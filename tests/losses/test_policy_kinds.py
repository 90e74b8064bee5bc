"""losses.policy_loss: every kind by the formula of its paper, its defaults, corrections, metrics and errors.

The formulas are written out here one response after the other, in Python numbers, and know nothing of the op.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.losses import group_advantages, policy_loss
from irlfast.losses.aggregation import AGGREGATIONS
from irlfast.losses.policy import POLICY_KINDS, PolicyLoss

# A whole response, one with a hole in its mask, one that is empty, one of a single token.
LENGTHS = (6, 5, 0, 1)
PER_TOKEN = ("logprobs", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")

# What a kind takes where nothing is said: clip and aggregation.
DEFAULTS: dict[str, tuple[tuple[float, float], str]] = {
    "reinforce": ((0.2, 0.2), "token_mean"),
    "token": ((0.2, 0.2), "token_mean"),
    "ppo": ((0.2, 0.2), "token_mean"),
    "cispo": ((0.2, 0.2), "token_mean"),
    "rloo": ((0.2, 0.2), "seq_mean_token_sum"),
    "grpo": ((0.2, 0.2), "seq_mean_token_mean"),
    "dr_grpo": ((0.2, 0.2), "token_sum"),
    "dapo": ((0.2, 0.28), "token_mean"),
    "gspo": ((3e-4, 4e-4), "seq_mean_token_mean"),
}
DR_GRPO_LENGTH = 4 * 6.0


def inputs(seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS) + 2

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)

    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask[1, 2] = False
    base = normal() - 2
    values = {
        "logprobs": base,
        "old_logprobs": base + normal(spread),
        "ref_logprobs": base + normal(spread),
        "rollout_logprobs": base + normal(spread),
        "entropy": normal().exp(),
    }
    advantages = torch.tensor([0.7, -1.3, 0.4, -0.6], dtype=torch.float64)
    return {"mask": mask, "advantages": advantages} | {k: torch.where(mask, v, torch.nan) for k, v in values.items()}


def for_kind(kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`token` takes an advantage a token."""
    if kind == "token":
        batch = batch | {"advantages": batch["advantages"][:, None] * torch.linspace(0.5, 1.5, batch["mask"].shape[1])}
    return batch


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    inside = torch.arange(batch["mask"].shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {k: v[inside] if v.ndim == 2 else v for k, v in batch.items()} | {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(LENGTHS)])
    }


def ppo_term(ratio: Tensor, advantage: Tensor, clip: tuple[float, float], dual_clip: float | None = None) -> Tensor:
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
    if dual_clip is not None and advantage < 0:
        gain = torch.maximum(gain, dual_clip * advantage)
    return -gain


def response_terms(
    kind: str, logp: Tensor, old: Tensor, advantages: Tensor, clip: tuple[float, float], dual_clip: float | None
) -> list[Tensor]:
    """The terms of one response's tokens, all of them unmasked."""
    ratios = (logp - old).exp()
    if kind == "gspo":
        ratios = (logp - old).mean().exp().expand(len(logp))
    if kind in ("reinforce", "token", "rloo"):
        return [-a * x for a, x in zip(advantages, logp, strict=True)]
    if kind == "cispo":
        held = [min(float(r), 1 + clip[1]) for r in ratios.detach()]
        return [-r * a * x for r, a, x in zip(held, advantages, logp, strict=True)]
    return [ppo_term(r, a, clip, dual_clip) for r, a in zip(ratios, advantages, strict=True)]


def formula(
    kind: str,
    batch: dict[str, Tensor],
    *,
    clip: tuple[float, float] | None = None,
    aggregation: str | None = None,
    denominator: float | None = None,
    dual_clip: float | None = None,
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
    kept: Callable[[int], bool] = lambda row: True,
) -> Tensor:
    """The loss; `weight` of a response's old - rollout multiplies its terms."""
    clip = DEFAULTS[kind][0] if clip is None else clip
    aggregation = DEFAULTS[kind][1] if aggregation is None else aggregation
    sums, counts = [], []
    for row in range(len(LENGTHS)):
        at = batch["mask"][row]
        if not at.any() or not kept(row):
            continue
        advantages = batch["advantages"]
        own = advantages[row][at] if advantages.ndim == 2 else advantages[row].expand(int(at.sum()))
        logp, old, rollout = (batch[f"{name}logprobs"][row][at] for name in ("", "old_", "rollout_"))
        terms = torch.stack(response_terms(kind, logp, old, own, clip, dual_clip)) * weight(old - rollout)
        sums.append(terms.sum())
        counts.append(int(at.sum()))
    if aggregation == "seq_mean_token_mean":
        sums = [s / n for s, n in zip(sums, counts, strict=True)]
    over = {"token_mean": sum(counts), "token_sum": 1}.get(aggregation, len(counts))
    return torch.stack(sums).sum() / (over if denominator is None else denominator)


def loss_and_gradient(function: Callable[..., Any], batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = batch["logprobs"].detach().clone().requires_grad_()
    result = function(batch=batch | {"logprobs": logprobs}, **options)
    loss = result.loss if isinstance(result, PolicyLoss) else result
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0].nan_to_num()


def ours(batch: dict[str, Tensor], **options: Any) -> PolicyLoss:
    return policy_loss(**batch, **options)


def expect_same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def constant(kind: str) -> dict[str, float]:
    return {"denominator": DR_GRPO_LENGTH} if kind == "dr_grpo" else {}


def test_the_kinds_are_those_of_this_file() -> None:
    assert set(POLICY_KINDS) == set(DEFAULTS)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", DEFAULTS)
def test_kind_is_its_formula_with_its_defaults(kind: str, impl: str) -> None:
    # Small enough that some responses' mean ratios lie within gspo's narrow range, and some outside.
    for seed, spread in ((0, 0.4), (1, 1e-3)):
        batch = for_kind(kind, inputs(seed, spread))
        want = loss_and_gradient(formula, batch, kind=kind, **constant(kind))
        expect_same(loss_and_gradient(ours, batch, kind=kind, impl=impl, **constant(kind)), want)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", DEFAULTS)
def test_aggregations_and_packing(kind: str, aggregation: str) -> None:
    batch = for_kind(kind, inputs(2))
    options: dict[str, Any] = {"kind": kind, "aggregation": aggregation, "clip": (0.1, 0.15)}
    padded = loss_and_gradient(ours, batch, **options)
    expect_same(padded, loss_and_gradient(formula, batch, **options))
    inside = torch.arange(batch["mask"].shape[1]) < torch.tensor(LENGTHS)[:, None]
    tight = loss_and_gradient(ours, packed(batch), **options)
    assert torch.equal(tight[0], padded[0])
    assert torch.equal(tight[1], padded[1][inside])
    everything = options | {"kl_coef": 0.1, "entropy_coef": 0.2, "tis_cap": 1.1, "icepop_band": (0.7, 1.5)}
    metrics, packed_metrics = (ours(x, **everything).metrics for x in (batch, packed(batch)))
    assert metrics == packed_metrics


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dapo", "gspo"])
def test_dual_clip(kind: str) -> None:
    batch = inputs(3, spread=1.5)
    options: dict[str, Any] = {"kind": kind, "dual_clip": 1.1, "clip": (0.01, 0.01)}
    want = loss_and_gradient(formula, batch, **options)
    expect_same(loss_and_gradient(ours, batch, **options), want)
    assert float(want[0]) != float(formula(batch=batch, kind=kind, clip=(0.01, 0.01)))


def test_a_wrong_sign_or_a_wrong_clip_would_be_noticed() -> None:
    """The comparisons above, made with formulas broken on purpose."""
    batch = inputs(0)
    for kind in DEFAULTS:
        own = for_kind(kind, batch)
        got = loss_and_gradient(ours, own, kind=kind, **constant(kind))
        flipped = own | {"advantages": -own["advantages"]}
        with pytest.raises(AssertionError):
            expect_same(got, loss_and_gradient(formula, flipped, kind=kind, **constant(kind)))
        if kind not in ("reinforce", "token", "rloo"):
            wider = loss_and_gradient(formula, own, kind=kind, clip=(0.3, 0.5), **constant(kind))
            with pytest.raises(AssertionError):
                expect_same(got, wider)


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "gspo", "cispo"])
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"tis_cap": 1.2}, lambda gap: gap.exp().clamp(max=1.2)),
        ({"tis_cap": 1.2, "tis_level": "sequence"}, lambda gap: gap.sum().exp().clamp(max=1.2).expand_as(gap)),
        ({"icepop_band": (0.7, 1.4)}, lambda gap: gap.exp() * ((gap.exp() >= 0.7) & (gap.exp() <= 1.4))),
        (
            {"icepop_band": (0.7, 1.4), "tis_level": "sequence"},
            lambda gap: (gap.sum().exp() * (0.7 <= gap.sum().exp() <= 1.4)).expand_as(gap),
        ),
        (
            {"icepop_band": (0.7, 1.4), "tis_cap": 1.2},
            lambda gap: gap.exp().clamp(max=1.2) * ((gap.exp() >= 0.7) & (gap.exp() <= 1.4)),
        ),
    ],
    ids=["tis", "tis of responses", "icepop", "icepop of responses", "both"],
)
def test_corrections_for_the_sampler(kind: str, options: dict[str, Any], weight: Callable[[Tensor], Tensor]) -> None:
    changed = 0
    for seed in range(3):
        batch = inputs(seed)
        want = loss_and_gradient(formula, batch, kind=kind, weight=weight)
        expect_same(loss_and_gradient(ours, batch, kind=kind, **options), want)
        changed += not torch.allclose(want[0], formula(kind, batch))
    assert changed


def test_dapo_drops_prompts_whose_responses_are_equally_good() -> None:
    """Prompt 7 has rewards 1, 1; prompt 3 has 0, 1, 2, whose second response lies on the mean."""
    groups = torch.tensor([3, 7, 3, 7, 3])
    advantages = group_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0]), groups, kind="grpo")
    assert [bool(a) for a in advantages] == [True, False, False, False, True]
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(5, 4, generator=generator)
    old = logprobs + 0.1
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 4, 1])[:, None]
    for arguments, kept in (({"groups": groups}, [0, 2, 4]), ({}, [0, 4])):
        loss, metrics = policy_loss(logprobs, advantages, mask, kind="dapo", old_logprobs=old, **arguments)
        rows = torch.tensor(kept)
        alone = policy_loss(
            logprobs[rows], advantages[rows], mask[rows], kind="ppo", clip=(0.2, 0.28), old_logprobs=old[rows]
        )
        assert torch.equal(loss, alone.loss)
        assert float(metrics["sequences"]) == len(kept)
        assert float(metrics["tokens"]) == int(mask[rows].sum())
    # One advantage a token says the same; what stands outside the mask does not.
    spread = torch.where(mask, advantages[:, None], 5.0)
    again = policy_loss(logprobs, spread, mask, kind="dapo", old_logprobs=old, groups=groups)
    assert float(again.metrics["sequences"]) == 3
    nothing = policy_loss(logprobs, 0 * advantages, mask, kind="dapo", old_logprobs=old)
    assert float(nothing.loss) == float(nothing.metrics["tokens"]) == 0.0


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_and_ranks_add_up(kind: str, aggregation: str) -> None:
    batch = for_kind(kind, inputs(4))
    tokens = int(batch["mask"].sum())
    denominator = {"token_mean": float(tokens), "token_sum": 24.0}.get(aggregation, 3.0)
    options: dict[str, Any] = {"kind": kind, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
    if aggregation == "token_sum":
        whole = ours(batch, denominator=denominator, **options).loss
    else:
        whole = ours(batch, **options).loss
    parts = [
        ours({k: v[rows] for k, v in batch.items()}, denominator=given, **options).loss
        for rows, given in ((slice(0, 1), denominator), (slice(1, 4), torch.tensor(denominator)))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-14)


# Three responses of one token each: ratios 1/2, 1 and 2, the sampler's 1, 2 and 1/2 times the old policy's.
RATIOS = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
SAMPLED = torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float64)  # old / rollout


def by_hand(kind: str = "ppo", **options: Any) -> dict[str, float]:
    old = torch.full((3, 1), -3.0, dtype=torch.float64)
    given: dict[str, Any] = {"advantages": torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)} | options
    metrics = policy_loss(
        old + RATIOS.log(),
        given.pop("advantages"),
        kind=kind,
        old_logprobs=old,
        ref_logprobs=old + RATIOS.log() - 0.5,
        rollout_logprobs=old - SAMPLED.log(),
        entropy=torch.tensor([[1.0], [2.0], [6.0]]),
        **given,
    ).metrics
    return {name: float(value) for name, value in metrics.items()}


def test_metrics_by_hand() -> None:
    third, log2 = 1 / 3, math.log(2)
    got = by_hand(clip=(0.2, 0.2), tis_cap=1.5, icepop_band=(0.6, 3.0), kl_estimator="k2")
    want = {
        # -1/2 -> clipped to 0.8 with A = -1; 1 is icepop's; 2 clipped to 1.2, corrected by 1.5
        "policy": (0.8 - 0.0 - 1.2 * 1.5) * third,
        "tokens": 3.0,
        "sequences": 3.0,
        "approx_kl": ((0.5 - 1 + log2) + (2 - 1 - log2)) * third,
        "ratio_mean": 3.5 * third,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "ess": 3.5**2 / (3 * 5.25),
        "clip_fraction": 2 * third,
        "clip_fraction_low": third,
        "clip_fraction_high": third,
        "kl": 0.125,
        "entropy": 3.0,
        "rollout_gap": 2 * log2 * third,
        "rollout_gap_max": log2,
        "rollout_kl": ((0.5 - 1 + log2) + (2 - 1 - log2)) * third,
        "tis_fraction": third,
        "icepop_fraction": third,
    }
    assert got == pytest.approx(want, rel=1e-12)
    assert by_hand(kl_estimator="k1")["kl"] == pytest.approx(0.5)
    assert by_hand(kl_estimator="k3")["kl"] == pytest.approx(math.exp(-0.5) - 0.5)
    # cispo cuts from above alone, whatever the advantage; terms without a ratio cut nothing and do not say so.
    assert by_hand("cispo")["clip_fraction_low"] == 0.0
    assert by_hand("cispo")["clip_fraction_high"] == pytest.approx(third)
    assert not {name for name in by_hand("reinforce") if "clip" in name}


def test_metrics_are_there_with_their_inputs() -> None:
    logprobs = -torch.ones(2, 2)
    bare = policy_loss(logprobs, torch.ones(2), kind="reinforce").metrics
    assert set(bare) == {"policy", "tokens", "sequences"}
    sampler = policy_loss(logprobs, torch.ones(2), kind="reinforce", rollout_logprobs=logprobs).metrics
    assert set(sampler) - set(bare) == {"rollout_gap", "rollout_gap_max", "rollout_kl"}


def test_gspo_reports_the_ratios_of_responses() -> None:
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    moved = old + torch.tensor([[0.3, 0.0, 0.0], [-0.6, 0.3, 0.0]], dtype=torch.float64)
    metrics = policy_loss(moved, torch.ones(2), kind="gspo", old_logprobs=old).metrics
    assert float(metrics["ratio_max"]) == pytest.approx(math.exp(0.1))
    assert float(metrics["ratio_min"]) == pytest.approx(math.exp(-0.1))
    # A gain that is clipped above counts for each token of its response.
    assert float(metrics["clip_fraction"]) == float(metrics["clip_fraction_high"]) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gspo"}, "kind 'gspo' needs old_logprobs, which was not given"),
        ({"kind": "dapo"}, "kind 'dapo' needs old_logprobs, which was not given"),
        ({"kind": "dr_grpo", "old": True}, "kind 'dr_grpo' divides by a constant: give denominator"),
        ({"kind": "ppo", "old": True, "groups": torch.zeros(2).long()}, "groups is given with kind 'ppo'; only 'dapo'"),
        ({"kind": "dapo", "old": True, "groups": torch.zeros(2)}, "groups has dtype torch.float32"),
        ({"kind": "dapo", "old": True, "groups": torch.zeros(3).long()}, r"groups has shape \(3,\)"),
        ({"kind": "cispo", "old": True, "dual_clip": 3.0}, "dual_clip is 3.0 with kind 'cispo'"),
        ({"kind": "ppo", "old": True, "dual_clip": 0.5}, "dual_clip is 0.5 with kind 'ppo'; expected more than 1"),
        ({"icepop_band": (0.5, 2.0)}, r"icepop_band = \(0\.5, 2\.0\) needs rollout_logprobs"),
        ({"icepop_band": (2.0, 0.5)}, r"icepop_band is \(2\.0, 0\.5\); expected \(low, high\)"),
        ({"tis_level": "batch"}, "tis_level is 'batch'; expected 'token' or 'sequence'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "expected packed \\[N\\], as cu_seqlens is given"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "cu_seqlens has dtype torch.float32; expected integer offsets"),
        ({"advantages": torch.ones(2).long()}, "advantages has dtype torch.int64"),
        ({"impl": "fast"}, "fast"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    logprobs = -torch.ones(2, 3)
    arguments: dict[str, Any] = {"advantages": torch.ones(2), "kind": "reinforce"} | options
    if arguments.pop("old", False):
        arguments["old_logprobs"] = logprobs
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(logprobs, **arguments)
