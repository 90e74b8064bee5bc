"""ops.policy_terms: the kernel against the reference for every term, aggregation and layout, and what must not matter.

The values themselves are worked out by hand in tests/losses/test_policy_loss.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast import _native
from irlfast.ops import policy_terms, token_stats
from irlfast.ops import policy_terms as op
from irlfast.ops._aggregation import AGGREGATIONS
from irlfast.ops.policy_terms import METRICS, TERMS, PolicyTerms, forward_cpu, policy_terms_reference

ISAS = _native.build_info()["isas_usable"]
PER_TOKEN = ("logprobs", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")

# Everything at once: both corrections act on some tokens, both clips and the dual clip too.
ALL: dict[str, Any] = {
    "clip": (0.2, 0.3),
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "entropy_coef": 0.2,
    "tis_cap": 1.3,
    "icepop_band": (0.6, 1.8),
}


def batch(
    lengths: list[int], width: int, *, seed: int = 0, spread: float = 0.4, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Padded sequences, NaN beyond their lengths, and a few tokens masked within."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)

    def normal(scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)

    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask &= torch.rand(rows, width, generator=generator) > 0.1
    base = normal() - 2
    values = {
        "logprobs": base,
        "old_logprobs": base + normal(spread),
        "ref_logprobs": base + normal(spread),
        "rollout_logprobs": base + normal(spread),
        "entropy": normal().exp(),
        "advantages": normal(),
    }
    return {"mask": mask} | {k: torch.where(mask, v, torch.nan) for k, v in values.items()}


def one_a_sequence(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    rows, dtype = padded["logprobs"].shape[0], padded["logprobs"].dtype
    return padded | {"advantages": torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)}


def packed(padded: dict[str, Tensor], lengths: list[int], offsets: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """The same sequences without their padding."""
    inside = torch.arange(padded["mask"].shape[1]) < torch.tensor(lengths)[:, None]
    values = {k: v[inside] if v.ndim == 2 else v for k, v in padded.items()}
    return values | {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=offsets)}


def run(
    function: Callable[..., PolicyTerms], inputs: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, metrics, and the gradients to logprobs and entropy of three times the loss."""
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in ("logprobs", "entropy")}
    loss, metrics = function(**inputs, **options)
    wanted = [inputs["logprobs"], inputs["entropy"]]
    grads = torch.autograd.grad(loss * 3, wanted, allow_unused=True)
    return (
        loss.detach(),
        metrics,
        *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)),
    )


# 1024 and 1025: a whole block of the widest float vectors, and one token more; 70 ragged against every vector.
LENGTHS = {"ragged": [70, 3, 0, 1, 69], "blocks": [1025, 1024, 512, 7, 1]}


@pytest.mark.parametrize("layout", ["padded", "packed", "packed int32"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("term", TERMS)
def test_kernel_equals_the_reference(term: str, aggregation: str, lengths: list[int], layout: str) -> None:
    touched: dict[str, float] = {}
    for seed, (level, dual, estimator, per_token, dtype) in enumerate(
        [
            ("token", None, "k3", True, torch.float64),
            ("sequence", 1.5, "k2", False, torch.float64),
            ("token", 1.5, "k1", False, torch.float32),
            ("sequence", None, "k3", True, torch.float32),
        ]
    ):
        # A product over a long sequence leaves the band and the cap behind unless its factors are near 1.
        spread = 0.05 if level == "sequence" else 0.4
        inputs = batch(lengths, max(lengths) + 5, seed=seed, dtype=dtype, spread=spread)
        inputs = inputs if per_token else one_a_sequence(inputs)
        if layout != "padded":
            inputs = packed(inputs, lengths, torch.int32 if "32" in layout else torch.int64)
        options = ALL | {
            "term": term,
            "aggregation": aggregation,
            "correction_level": level,
            "dual_clip": dual if term in ("ppo", "gspo") else None,
            "kl_estimator": estimator,
            "kl_coef": 0.0 if estimator == "k1" else 0.3,
            "icepop_band": (0.9, 1.1) if level == "sequence" else (0.6, 1.8),
            "tis_cap": 1.05 if level == "sequence" else 1.3,
            "clip": (0.002, 0.003) if term == "gspo" else (0.2, 0.3),
        }
        ours = run(policy_terms, inputs, impl="cpu", **options)
        # float32 inputs are exact in float64: the reference then has the truth.
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = run(policy_terms_reference, wide, **options)
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        for mine, truth in zip(ours, exact, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine.double(), truth, **tolerance)
        for name, value in zip(METRICS, exact[1].tolist(), strict=True):
            touched[name] = touched.get(name, 0.0) + value
    assert touched["tis_fraction"] > 0
    assert touched["icepop_fraction"] > 0
    if term in ("ppo", "gspo"):
        assert touched["clip_fraction_low"] > 0
    if term != "reinforce":
        assert touched["clip_fraction_high"] > 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("term", TERMS)
def test_every_instruction_set_and_thread_count(term: str, dtype: torch.dtype, isa: str) -> None:
    lengths = [1025, 70, 0, 3] * 20
    inputs = batch(lengths, 1030, dtype=dtype)
    names = ("logprobs", "advantages", "mask", "cu_seqlens", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    tensors = [inputs.get(name) for name in (*names, "entropy", "keep", "denominator")]
    numbers = (0.0, True, TERMS.index(term), 0.2, 0.3, 0.0, 0.3, 2, 0.2, 1.3, 0.6, 1.8, False, 1, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = forward_cpu(*tensors, *numbers, isa=isa)
        torch.set_num_threads(3)
        three = forward_cpu(*tensors, *numbers, isa=isa)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    exact = run(
        policy_terms_reference,
        {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()},
        term=term,
        aggregation="seq_mean_token_mean",
        **ALL,
    )
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    scaled = (one[0], one[1], one[2] * 3, one[3] * 3)
    for mine, truth in zip(scaled, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, **tolerance)


def test_gradient_is_no_less_exact_than_eager() -> None:
    """|kernel - float64| <= |eager in float32 - float64| + 1e-6 of the largest gradient."""
    inputs = batch([512] * 64, 512, dtype=torch.float32)
    options = {"term": "ppo", "kl_coef": 0.1, "kl_estimator": "k3", "aggregation": "token_sum"}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = run(policy_terms_reference, wide, **options)
    ours, eager = run(policy_terms, inputs, **options), run(policy_terms_reference, inputs, **options)
    for mine, plain, truth in zip(ours, eager, exact, strict=True):
        scale = 1e-6 * (1 + float(truth.abs().max()))
        assert float((mine - truth).abs().max()) <= float((plain - truth).abs().max()) + scale


@pytest.mark.parametrize("term", [t for t in TERMS if t != "cispo"])  # whose gradient is not that of its value
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(term: str, estimator: str, level: str) -> None:
    lengths = [6, 3, 0, 1]
    inputs = packed(one_a_sequence(batch(lengths, 8)), lengths)
    inputs = {k: v if k in ("mask", "cu_seqlens") else v.nan_to_num() for k, v in inputs.items()}
    logprobs, entropy = inputs.pop("logprobs"), inputs.pop("entropy")
    options = ALL | {"term": term, "kl_estimator": estimator, "correction_level": level}

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_terms(logprobs, entropy=entropy, impl="cpu", **inputs, **options).loss

    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


def test_cispo_has_the_gradient_of_its_definition() -> None:
    inputs = batch([6, 3], 6)
    got = run(policy_terms, inputs, term="cispo", aggregation="token_sum", clip=(0.2, 0.1))[2]
    ratio = torch.exp(inputs["logprobs"] - inputs["old_logprobs"])
    want = -3 * ratio.clamp(max=1.1) * inputs["advantages"]
    torch.testing.assert_close(got, want.nan_to_num())


def _op_arguments(*, grad: bool, with_offsets: bool = False) -> tuple[Any, ...]:
    inputs = {k: v if k == "mask" else v.nan_to_num() for k, v in batch([5, 2, 0], 5).items()}
    if with_offsets:
        inputs = packed(inputs, [5, 2, 0])
    if grad:
        inputs["logprobs"].requires_grad_()
        inputs["entropy"].requires_grad_()
    names = ("logprobs", "advantages", "mask", "cu_seqlens", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    tensors = [inputs.get(name) for name in (*names, "entropy", "keep", "denominator")]
    return *tensors, 0.0, True, 1, 0.2, 0.3, 0.0, 0.3, 2, 0.2, 1.3, 0.6, 1.8, False, 0, grad


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, with_offsets: bool) -> None:
    torch.library.opcheck(torch.ops.irlfast.policy_terms.default, _op_arguments(grad=grad, with_offsets=with_offsets))


@pytest.mark.parametrize("with_denominator", [False, True])
def test_compiles_without_a_break(with_denominator: bool) -> None:
    inputs = batch([5, 2, 0], 5)
    options: dict[str, Any] = ALL | {"term": "ppo"}
    if with_denominator:
        options["denominator"] = torch.tensor(9.0)
    compiled = torch.compile(policy_terms, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(run(compiled, inputs, **options), run(policy_terms, inputs, **options), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("floating", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_may_have_any_dtype(dtype: torch.dtype, floating: torch.dtype) -> None:
    inputs = batch([1030, 2, 0], 1030)
    plain = run(policy_terms, inputs, term="ppo", **ALL)
    words = inputs["mask"].to(dtype)
    numbers = torch.where(inputs["mask"], 0.25, -0.0).to(floating)
    for mask in (words, words * 64, numbers):
        for mine, other in zip(run(policy_terms, inputs | {"mask": mask}, term="ppo", **ALL), plain, strict=True):
            assert torch.equal(mine, other)


def test_layouts_in_memory_do_not_matter() -> None:
    inputs = batch([6, 3, 1], 7)
    scattered = {k: torch.stack([v, v])[0].t().contiguous().t() for k, v in inputs.items()}
    assert not scattered["logprobs"].is_contiguous()
    for mine, plain in zip(run(policy_terms, scattered, **ALL), run(policy_terms, inputs, **ALL), strict=True):
        assert torch.equal(mine, plain)


def test_keep_masks_whole_sequences() -> None:
    inputs = batch([6, 3, 5, 0], 7)
    keep = torch.tensor([True, False, True, True])
    masked = inputs | {"mask": inputs["mask"] & keep[:, None]}
    for impl in ("cpu", "reference"):
        left = run(policy_terms, inputs | {"keep": keep}, impl=impl, **ALL)
        right = run(policy_terms, masked, impl=impl, **ALL)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


options = st.fixed_dictionaries(
    {
        "term": st.sampled_from(TERMS),
        "aggregation": st.sampled_from(AGGREGATIONS),
        "correction_level": st.sampled_from(["token", "sequence"]),
        "kl_estimator": st.sampled_from(["k2", "k3"]),
    }
)
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, padding=st.integers(0, 20), options=options, seed=st.integers(0, 2**16))
def test_padded_and_packed_give_the_same_bits(
    lengths: list[int], padding: int, options: dict[str, Any], seed: int
) -> None:
    inputs = batch(lengths, max(lengths) + padding, seed=seed, dtype=torch.float32)
    padded_loss, padded_metrics, padded_grad, _ = run(policy_terms, inputs, **ALL | options)
    tight = packed(inputs, lengths)
    if len(lengths) == len(tight["logprobs"]):  # then N = B, and advantages would be taken as one a sequence
        return
    loss, metrics, grad, _ = run(policy_terms, tight, **ALL | options)
    inside = torch.arange(inputs["mask"].shape[1]) < torch.tensor(lengths)[:, None]
    assert torch.equal(loss, padded_loss)
    assert torch.equal(metrics, padded_metrics)
    assert torch.equal(grad, padded_grad[inside])
    assert (padded_grad[~inside] == 0).all()


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, options=options, seed=st.integers(0, 2**16))
def test_the_order_of_the_batch_does_not_matter(lengths: list[int], options: dict[str, Any], seed: int) -> None:
    inputs = batch(lengths, max(lengths) + 1, seed=seed)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    loss, metrics, grad, _ = run(policy_terms, inputs, **ALL | options)
    other_loss, other_metrics, other_grad, _ = run(
        policy_terms, {k: v[order] for k, v in inputs.items()}, **ALL | options
    )
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_metrics, metrics, rtol=1e-12, atol=1e-14)
    assert torch.equal(other_grad, grad[order])


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, cut=st.integers(0, 6), options=options, seed=st.integers(0, 2**16))
def test_pieces_and_ranks_add_up_to_the_whole(lengths: list[int], cut: int, options: dict[str, Any], seed: int) -> None:
    """Micro-batches of one rank, or one batch on each of two ranks, with the global count as denominator."""
    inputs = batch(lengths, max(lengths) + 1, seed=seed)
    whole = run(policy_terms, inputs, **ALL | options)
    tokens = inputs["mask"].sum(1)
    count = {"token_mean": int(tokens.sum()), "token_sum": 1}.get(options["aggregation"], int((tokens > 0).sum()))
    if count == 0:
        return
    parts = [
        run(policy_terms, {k: v[rows] for k, v in inputs.items()}, denominator=denominator, **ALL | options)
        for rows, denominator in ((slice(0, cut), float(count)), (slice(cut, None), torch.tensor(count)))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), whole[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("term", TERMS)
def test_shifting_the_logits_leaves_the_loss_and_the_first_ratio_is_one(term: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    labels = torch.randint(11, (3, 5))
    old = token_stats(logits, labels).logprob
    results = []
    for shift in (0.0, 64.0):
        leaf = (logits + shift).requires_grad_()
        stats = token_stats(leaf, labels)
        loss, metrics = policy_terms(
            stats.logprob,
            torch.tensor([1.0, -2.0, 0.5]),
            term=term,
            old_logprobs=old,
            entropy=stats.entropy,
            entropy_coef=0.1,
        )
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        if shift == 0.0:
            values = dict(zip(METRICS, metrics.tolist(), strict=True))
            assert values["ratio_min"] == values["ratio_max"] == values["ratio_mean"] == values["ess"] == 1.0
            assert values["approx_kl"] == values["clip_fraction"] == 0.0
    for plain, shifted in zip(*results, strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=2e-5)


BREAKS = {
    "terms": ("plain = -ratio * advantage", "plain = -ratio * advantage * 1.01"),
    "clip": ("ratio.clamp(1 - clip[0], 1 + clip[1])", "ratio.clamp(1 - clip[0], 1 + 2 * clip[1])"),
    "k3": ("torch.expm1(-held) + held", "torch.expm1(-held) + held + 1e-3"),
    "ratio correction": ("ratio * kl if", "ratio.detach() * kl if"),
    "entropy": ("terms - entropy_coef * entropy", "terms - 0.99 * entropy_coef * entropy"),
    "cap": ("sampled.clamp(max=tis_cap)", "sampled.clamp(max=tis_cap + 0.01)"),
    "band": ("torch.where(outside, 0.0, terms * weight)", "terms * weight"),
    "mask": ("mask.bool()", "torch.ones_like(logprobs, dtype=torch.bool)"),
    "detached old": ("values.detach().to(dtype)", "values.to(dtype)"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_of_any_term_is_noticed(name: str) -> None:
    """The comparison above would fail: here it is made with a specification that was broken on purpose."""
    import inspect
    import sys

    module = sys.modules[op.__module__]
    source = inspect.getsource(module)
    sound, broken = BREAKS[name]
    assert source.count(sound) == 1
    start = source.index("def policy_terms_reference")
    end = source.index("LIBRARY.define(")
    names = dict(vars(module))
    exec(source[start:end].replace(sound, broken), names)
    inputs = batch([70, 33, 9], 75)
    if name == "mask":
        inputs = {k: v if k == "mask" else v.nan_to_num(0.5) for k, v in inputs.items()}
    settings_ = ALL | {"term": "ppo"}
    if name == "detached old":
        old = inputs["old_logprobs"].nan_to_num().requires_grad_()
        loss = names["policy_terms_reference"](**inputs | {"old_logprobs": old}, **settings_).loss
        assert loss.requires_grad
        assert not policy_terms(**inputs | {"old_logprobs": old}, **settings_).loss.requires_grad
        return
    ours = run(policy_terms, inputs, **settings_)
    other = run(names["policy_terms_reference"], inputs, **settings_)
    assert any(not torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(ours, other, strict=True))


def test_the_kernel_says_that_it_differentiates_once() -> None:
    inputs = {k: v if k == "mask" else v.nan_to_num() for k, v in batch([3, 2], 3).items()}
    logprobs = inputs.pop("logprobs").requires_grad_()
    loss = policy_terms(logprobs, **inputs, term="ppo").loss
    (gradient,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        gradient.sum().backward()
    loss = policy_terms(logprobs, **inputs, term="ppo", impl="reference").loss
    (gradient,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    gradient.sum().backward()


def test_backward_twice_gives_the_same_gradient() -> None:
    inputs = batch([3, 2], 3)
    logprobs = inputs.pop("logprobs").nan_to_num().requires_grad_()
    loss = policy_terms(logprobs, **inputs, term="ppo").loss
    first = torch.autograd.grad(loss, logprobs, retain_graph=True)[0].clone()
    torch.autograd.grad(loss, logprobs, retain_graph=True)[0].mul_(5)
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0], first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"term": "grpo"}, ValueError, r"term is 'grpo'; expected one of \('reinforce'"),
        ({"term": "ppo", "old_logprobs": None}, ValueError, "term 'ppo' needs old_logprobs, which was not given"),
        ({"icepop_band": (2.0, 1.0)}, ValueError, r"icepop_band is \(2\.0, 1\.0\); expected \(low, high\)"),
        (
            {"icepop_band": (0.5, 2.0), "rollout_logprobs": None},
            ValueError,
            r"icepop_band = \(0\.5, 2\.0\) needs rollout_logprobs",
        ),
        ({"correction_level": "group"}, ValueError, "tis_level is 'group'; expected 'token' or 'sequence'"),
        ({"denominator": torch.tensor(0.0)}, ValueError, r"denominator is 0\.0; expected a positive count"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"expected packed \[N\], as cu_seqlens is given"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"expected \[B, T\], or \[N\] with cu_seqlens"),
        ({"keep": torch.ones(2)}, ValueError, r"keep has shape \(2,\), dtype torch.float32"),
        ({"old_logprobs": torch.zeros(2, 3).long()}, TypeError, "old_logprobs has dtype torch.int64"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = batch([3, 2], 3) | change
    with pytest.raises(error, match=message):
        policy_terms(**inputs)


def test_offsets_are_checked() -> None:
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 3; expected from 0 to 4"):
        policy_terms(zeros, zeros, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens falls from 3 to 2 at sequence 1"):
        policy_terms(zeros, zeros, cu_seqlens=torch.tensor([0, 3, 2, 4]))
