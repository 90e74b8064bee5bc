"""The Triton policy_terms, through the public op."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from segment_cases import LONG, RAGGED, exactly, narrow, offsets, pack, sequences, to, unlooked_at
from torch import Tensor
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import policy_terms
from irlfast.ops._aggregation import AGGREGATIONS
from irlfast.ops.policy_terms import METRICS, TERMS, PolicyTerms, policy_terms_reference

# Everything at once: both corrections act on some tokens, both clips and the dual clip too.
ALL: dict[str, Any] = {
    "clip": (0.2, 0.3),
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "entropy_coef": 0.2,
    "tis_cap": 1.3,
    "icepop_band": (0.6, 1.8),
}


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(request, monkeypatch)


def batch(
    lengths: list[int], *, layout: str = "padded", per_token: bool = True, spread: float = 0.4, dual: bool = False
) -> dict[str, Any]:
    """NaN beyond the sequences and under the mask's holes."""
    mask, draw = sequences(lengths)
    base = draw(1.0, -2.0)
    inputs = {
        "logprobs": base,
        "advantages": draw() if per_token else torch.randn(len(lengths), dtype=torch.float64),
        "mask": mask,
        "old_logprobs": draw(spread, base),
        "ref_logprobs": draw(spread, base),
        "rollout_logprobs": draw(spread, base),
        "entropy": draw().exp(),
    }
    if layout != "padded":
        inputs = {k: pack(v, lengths) if v.ndim == 2 else v for k, v in inputs.items()}
        inputs["cu_seqlens"] = offsets(lengths, torch.int32 if "32" in layout else torch.int64)
    return inputs


def run(function: Callable[..., PolicyTerms], inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Loss, metrics, and the gradients to logprobs and entropy of three times the loss."""
    inputs = inputs | {k: inputs[k].detach().clone().requires_grad_() for k in ("logprobs", "entropy") if k in inputs}
    wanted = [inputs[k] for k in ("logprobs", "entropy") if k in inputs]
    loss, metrics = function(**inputs, **options)
    grads = torch.autograd.grad(loss * 3, wanted, allow_unused=True)
    results = {"loss": loss.detach(), "metrics": metrics}
    for name, leaf, gradient in zip(("gradient", "entropy's gradient"), wanted, grads, strict=False):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def check(device: str, dtype: torch.dtype, inputs: dict[str, Any], **options: Any) -> dict[str, float]:
    """Against the specification in float64, which narrower input enters exactly. Returns the metrics."""
    given = to("cpu", dtype, inputs)
    ours = run(policy_terms, to(device, dtype, given), impl="triton", **options)
    exact = run(policy_terms_reference, exactly(given), **options)
    wide = dtype == torch.float64
    for name, truth in exact.items():
        mine = ours[name]
        assert mine.dtype == (dtype if "gradient" in name else torch.float64 if wide else torch.float32)
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if wide else {"rtol": 2e-5, "atol": 2e-6}
        if dtype == torch.bfloat16 and "gradient" in name:
            tolerance["rtol"] = 2.0**-8
        torch.testing.assert_close(mine.cpu().double(), truth, **tolerance)
    if inputs.get("mask") is not None:
        assert (ours["gradient"].cpu()[~inputs["mask"]] == 0).all()
    return dict(zip(METRICS, exact["metrics"].tolist(), strict=True))


# correction level, dual clip, estimator, an advantage a token
VARIANTS = [
    ("token", None, "k3", True, torch.float64),
    ("sequence", 1.5, "k2", False, torch.float64),
    ("token", 1.5, "k1", False, torch.float32),
    ("sequence", None, "k3", True, torch.bfloat16),
]


def options_of(variant: tuple[Any, ...], term: str) -> dict[str, Any]:
    level, dual, estimator, _, _ = variant
    # A product over a long sequence leaves the band and the cap behind unless its factors are near 1.
    return ALL | {
        "term": term,
        "correction_level": level,
        "dual_clip": dual if term in ("ppo", "gspo") else None,
        "kl_estimator": estimator,
        "kl_coef": 0.0 if estimator == "k1" else 0.3,
        "icepop_band": (0.9, 1.1) if level == "sequence" else (0.6, 1.8),
        "tis_cap": 1.05 if level == "sequence" else 1.3,
        "clip": (0.01, 0.015) if term == "gspo" else (0.2, 0.3),
    }


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("term", TERMS)
def test_matches_float64(device: str, term: str, aggregation: str, layout: str) -> None:
    torch.manual_seed(1)
    touched = dict.fromkeys(METRICS, 0.0)
    for variant in VARIANTS[::3] if layout == "padded" else VARIANTS[1:3]:
        spread = 0.05 if variant[0] == "sequence" else 0.4
        inputs = batch(RAGGED, layout=layout, per_token=variant[3], spread=spread)
        metrics = check(device, variant[4], inputs, aggregation=aggregation, **options_of(variant, term))
        touched = {name: touched[name] + metrics[name] for name in METRICS}
    assert touched["tis_fraction"] > 0
    assert touched["icepop_fraction"] > 0
    if term in ("ppo", "gspo"):
        assert touched["clip_fraction_low"] > 0
    if term != "reinforce":
        assert touched["clip_fraction_high"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_matches_float64_in_real_sizes(term: str, variant: tuple[Any, ...], layout: str) -> None:
    torch.manual_seed(0)
    inputs = batch(LONG, layout=layout, per_token=variant[3], spread=0.02 if variant[0] == "sequence" else 0.4)
    check("cuda", variant[4], inputs, aggregation="seq_mean_token_mean", **options_of(variant, term))


OPTIONAL = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")


@pytest.mark.parametrize("missing", [c for n in (1, 4) for c in itertools.combinations(OPTIONAL, n)], ids=str)
def test_inputs_that_are_not_given(device: str, missing: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    inputs = {k: v for k, v in batch(RAGGED).items() if k not in missing}
    options = dict(ALL)
    if "ref_logprobs" in missing:
        options["kl_coef"] = 0.0
    if "entropy" in missing:
        options["entropy_coef"] = 0.0
    if "rollout_logprobs" in missing:
        options["tis_cap"] = options["icepop_band"] = None
    check(device, torch.float64, inputs, term="reinforce", **options)


@pytest.mark.parametrize("correction", [{"tis_cap": 1.3}, {"icepop_band": (0.6, 1.8)}, {}], ids=str)
def test_corrections_apart(device: str, correction: dict[str, Any]) -> None:
    torch.manual_seed(2)
    check(device, torch.float64, batch(RAGGED), term="ppo", **correction)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_beyond_what_exp_is_given(device: str, term: str, level: str) -> None:
    """Differences of hundreds, and -inf: held at 20, without gradient there; nothing overflows."""
    torch.manual_seed(3)
    inputs = batch(RAGGED, layout="packed", spread=60.0)
    inputs["mask"][:2] = True
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "entropy", "logprobs"):
        inputs[name][:2] = -1.0
    inputs["rollout_logprobs"][0] = -math.inf
    check(device, torch.float64, inputs, **ALL | {"term": term, "correction_level": level, "kl_estimator": "k2"})


@pytest.mark.parametrize("term", ["ppo", "gspo"])
def test_a_nan_that_counts_shows_in_the_metrics(device: str, term: str) -> None:
    """An extreme would forget it."""
    torch.manual_seed(4)
    inputs = {k: v if k == "mask" else v.nan_to_num() for k, v in batch([17, 3]).items()}
    inputs["mask"][:] = True
    inputs["old_logprobs"][0, 4] = math.nan
    inputs["rollout_logprobs"][1, 2] = math.nan
    metrics = run(policy_terms, to(device, torch.float32, inputs), impl="triton", term=term)["metrics"]
    values = dict(zip(METRICS, metrics.tolist(), strict=True))
    for name in ("policy", "ratio_mean", "ratio_min", "ratio_max", "ess", "rollout_gap", "rollout_gap_max"):
        assert math.isnan(values[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed int32"])
def test_keep_masks_whole_sequences(device: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    inputs = batch(RAGGED, layout=layout) | {"keep": torch.tensor([True, True, False, True, False])}
    check(device, dtype, inputs, term="gspo", aggregation="seq_mean_token_mean", **ALL)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counts(device: str, aggregation: str) -> None:
    torch.manual_seed(6)
    inputs = batch([5, 0, 17])
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    metrics = check(device, torch.float64, inputs, term="gspo", aggregation=aggregation, **ALL)
    assert metrics["ratio_mean"] == 1.0
    for shape in ((0, 3), (2, 0)):
        zero = torch.zeros(shape, device=device, requires_grad=True)
        loss, values = policy_terms(zero, zero.detach(), aggregation=aggregation, impl="triton")
        assert float(loss.detach()) == float(values[0]) == 0.0
        assert torch.autograd.grad(loss, zero)[0].shape == shape


@pytest.mark.parametrize("denominator", [7.0, torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)], ids=str)
def test_denominator(device: str, denominator: float | Tensor) -> None:
    torch.manual_seed(7)
    inputs = batch(RAGGED)
    here = denominator.to(device) if isinstance(denominator, Tensor) else denominator
    ours = run(policy_terms, to(device, torch.float64, inputs), denominator=here, impl="triton", term="ppo", **ALL)
    exact = run(policy_terms_reference, inputs, denominator=7.0, term="ppo", **ALL)
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name].cpu(), truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("denominator", [7.0, 0.0, -1.0])
def test_a_denominator_that_is_read_on_the_device(device: str, denominator: float) -> None:
    """There nobody checks it: one that is not positive makes all NaN."""
    from irlfast.kernels._policy_sums import PARTIALS, policy_terms_report

    sums = torch.zeros(3, PARTIALS.value, dtype=torch.float64, device=device)
    sums[:, 0] = 2.0  # tokens
    sums[:, 1] = torch.tensor([14.0, 7.0, 7.0])  # their terms
    loss, scale = torch.empty((), device=device), torch.empty((), device=device)
    metrics = torch.empty(len(METRICS), device=device)
    given = torch.tensor(denominator, device=device)
    flags = {"OLD": False, "REF": False, "ENTROPY": False, "ROLLOUT": False, "CORRECTS": False}
    policy_terms_report[(1,)](
        sums, given, loss, metrics, scale, 3, 0, 0, 0, TERM=0, AGGREGATION=1, **flags, BLOCK=2, enable_fp_fusion=True
    )
    wanted = (2.0, 1 / 7) if denominator > 0 else (math.nan, math.nan)
    assert (float(loss), float(scale)) == pytest.approx(wanted, nan_ok=True)
    assert metrics[1:3].tolist() == [6.0, 3.0]


@pytest.mark.parametrize("term", ["ppo", "gspo"])
def test_offsets_that_leave_a_gap_are_held_within_the_tensor(
    device: str, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlooked_at(monkeypatch)
    torch.manual_seed(12)
    values = to(device, torch.float32, batch([40]))
    values = {k: (v.nan_to_num() if v.is_floating_point() else v)[0, :40] for k, v in values.items()}
    cu_seqlens = torch.tensor([20, 25, 24, 99], device=device)
    got = run(policy_terms, values | {"cu_seqlens": cu_seqlens}, term=term, impl="triton", **ALL)
    assert (got["gradient"][:20] == 0).all()
    assert (got["entropy's gradient"][:20] == 0).all()
    assert got["gradient"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float64], ids=str)
def test_a_mask_may_have_any_dtype(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    inputs = to(device, torch.float32, batch([17, 3]))
    plain = run(policy_terms, inputs, impl="triton", term="ppo", **ALL)
    mask = inputs["mask"]
    words = torch.where(mask, 0.25, -0.0).to(dtype) if dtype.is_floating_point else mask.to(dtype) * 64
    other = run(policy_terms, inputs | {"mask": words}, impl="triton", term="ppo", **ALL)
    assert all(torch.equal(other[name], plain[name]) for name in plain)


@pytest.mark.parametrize("term", ["ppo", "gspo"])
def test_layout_padding_and_strides_do_not_show(device: str, term: str) -> None:
    """The same bits, whatever surrounds a sequence; its gradient does not feel its neighbours."""
    torch.manual_seed(9)
    padded = to(device, torch.float32, batch(RAGGED))
    options: dict[str, Any] = ALL | {"term": term, "aggregation": "seq_mean_token_sum", "impl": "triton"}
    want = run(policy_terms, padded, **options)
    inside = (torch.arange(padded["mask"].shape[1]) < torch.tensor(RAGGED)[:, None]).to(device)
    tight = {k: v[inside] for k, v in padded.items()} | {"cu_seqlens": offsets(RAGGED).to(device)}
    got = run(policy_terms, tight, **options)
    assert torch.equal(got["loss"], want["loss"])
    assert torch.equal(got["metrics"], want["metrics"])
    assert torch.equal(got["gradient"], want["gradient"][inside])
    scattered = {k: v.t().contiguous().t() for k, v in padded.items()}
    got = run(policy_terms, scattered, **options)
    assert all(torch.equal(got[name], want[name]) for name in want)
    alone = run(policy_terms, {k: v[4:] for k, v in padded.items()}, denominator=1.0, **options)
    together = run(policy_terms, padded, denominator=1.0, **options)
    assert torch.equal(alone["gradient"], together["gradient"][4:])


def test_backward_twice_and_no_second_derivative(device: str) -> None:
    torch.manual_seed(10)
    inputs = to(device, torch.float32, batch([17, 3]))
    logprobs = inputs.pop("logprobs").nan_to_num().requires_grad_()
    loss = policy_terms(logprobs, **inputs, term="ppo", impl="triton").loss
    first = torch.autograd.grad(loss, logprobs, retain_graph=True)[0].clone()
    torch.autograd.grad(loss, logprobs, retain_graph=True)[0].mul_(5)
    assert torch.equal(torch.autograd.grad(loss, logprobs, retain_graph=True)[0], first)
    (gradient,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        gradient.sum().backward()


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_two_launches_read_and_write_every_array_once(layout: str) -> None:
    torch.manual_seed(11)
    inputs = to("cpu", torch.float32, batch(RAGGED, layout=layout))
    logprobs = inputs["logprobs"].requires_grad_()
    entropy = inputs["entropy"].requires_grad_()
    with count_traffic() as traffic:
        loss = policy_terms(**inputs, impl="triton", **ALL | {"term": "ppo"}).loss
    assert traffic.launches == 2
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "advantages"):
        assert traffic.read(inputs[name]) == inputs[name].nbytes, name
    # Once to count the tokens, once to use them.
    assert traffic.read(inputs["mask"]) == 2 * inputs["mask"].nbytes
    slopes = [x for x in loss.grad_fn.saved_tensors if x.shape == logprobs.shape and x is not logprobs]
    assert sum(traffic.written(x) for x in slopes) == logprobs.nbytes + entropy.nbytes


# Where, what it says and what it is changed to, and options that reach it.
BREAKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "the mask dropped on the last block": (
        "_segments",
        "inside = inside & (tl.load(mask + index, mask=inside, other=0) != 0)",
        "inside = inside & ((tl.load(mask + index, mask=inside, other=0) != 0) | (tl.max(index, axis=0) >= 32))",
        {"term": "reinforce"},
    ),
    "the upper clip": ("policy_terms", "at_least(at_most(ratio, ceiling), floor)", "at_least(ratio, floor)", {}),
    "the lower clip": ("policy_terms", "at_least(at_most(ratio, ceiling), floor)", "at_most(ratio, ceiling)", {}),
    "the dual clip": ("policy_terms", "term = tl.where(beyond, bound, term)", "term = term", {"dual_clip": 1.1}),
    "cispo's cap": ("policy_terms", "slope = -at_most(ratio, ceiling)", "slope = -ratio", {"term": "cispo"}),
    "the mean of gspo": ("policy_terms", "BLOCK) * inverse\n", "BLOCK)\n", {"term": "gspo"}),
    "the share of gspo": ("policy_terms", "tl.sum(term_slopes, axis=0) * inverse", "tl.sum(term_slopes, axis=0)",
                          {"term": "gspo"}),
    "the cap": ("policy_terms", "correction = at_most(sampled, cap)", "correction = sampled", {}),
    "the band": ("policy_terms", "slope = tl.where(outside, 0.0, slope)", "slope = slope", {}),
    "the smallest ratio starts at 0": ("policy_terms", 'ratio_min = tl.full([BLOCK], float("inf"), dtype=real)',
                                       "ratio_min = tl.zeros([BLOCK], dtype=real)", {}),
    "the ratio in k3's penalty": ("policy_terms", "penalty = ratio * kl", "penalty = kl", {}),
    "k3's slope": ("policy_terms", "free = tl.where(moves, d, -less_one)", "free = -less_one", {}),
    "entropy": ("policy_terms", "(-number(entropy_coef) * weight)", "(number(entropy_coef) * weight)", {}),
    "the mean over tokens": ("policy_terms", "weight = inverse", "weight = tokens",
                             {"aggregation": "seq_mean_token_mean"}),
    "exp": ("_segments", "q = q * f + 1 / 6\n", "q = q * f + 1 / 6.001\n", {}),
    "a sequence of the report": ("_policy_sums", "mask=index < count", "mask=index < count - 1", {}),
    "the denominator": ("_policy_sums", "own = tokens\n", "own = answers\n", {}),
    "sequences without a token": ("_policy_sums", "sequence_lanes += some", "sequence_lanes += (tokens >= 0)",
                                  {"aggregation": "seq_mean_token_sum"}),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed(name: str) -> None:
    *line, options = BREAKS[name]

    def proof() -> None:
        torch.manual_seed(0)
        check("cpu", torch.float64, batch(RAGGED, layout="packed"), **ALL | {"term": "ppo"} | options)

    assert_noticed(*line, proof)
