"""The Triton epilogues of linear_policy_ref_stats, through the public op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import (
    BIASES,
    DTYPES,
    PIECE,
    VOCABULARIES,
    all_but_last_masked,
    scattered_masked,
    unmasked,
    whole_chunk_masked,
)
from torch import Tensor
from triton_cases import certain_pair, error, near_pair, rising_pair, shifted_pair, unrelated_pair
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import PolicyRefStats, linear_policy_ref_stats, token_kl
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_pair_triton import TritonPairEpilogue
from irlfast.ops._triton import Block
from irlfast.ops.linear_policy_ref_stats import linear_policy_ref_stats_reference

PAIRS = [near_pair, unrelated_pair, shifted_pair, certain_pair, rising_pair]
DIFFERENTIABLE = ("logprob", "entropy", "lse", "reverse_kl", "forward_kl")
VOCAB = VOCABULARIES[-1]


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the interpreter, or "cuda"; with the blocks of the table, of which a chunk has four on the CPU."""
    return str(request.param)


class Pair(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V)
    ref_hidden: Tensor  # (N, D')
    ref_weight: Tensor  # (V, D')
    ref_bias: Tensor  # (V)
    labels: Tensor  # (N)

    def to(self, place: str | torch.dtype) -> Pair:
        labels = self.labels if isinstance(place, torch.dtype) else self.labels.to(place)
        return Pair(*(t.to(place) for t in self[:-1]), labels)


def pair_of(
    make: Callable[[int, int], tuple[Tensor, Tensor]] = near_pair,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    biases: tuple[Callable[[int], Tensor], Callable[[int], Tensor]] = (unmasked, unmasked),
    rows: int = 5,
) -> Pair:
    """Logits that `make` gives, plus biases that begin alike. A label in each chunk; the second row is ignored."""
    torch.manual_seed(vocab)
    logits, ref_logits = make(rows, vocab)
    eye, noise = torch.eye(rows, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    bias = biases[0](vocab)
    torch.manual_seed(vocab)
    ref_bias = biases[1](vocab)
    labels = (vocab - 1 - torch.arange(rows) * (PIECE - 1)) % vocab
    if rows > 1:
        labels[1] = -100
    weight = torch.cat([logits.t(), torch.randn(vocab, 3, dtype=torch.float64) * 0.1], 1)
    return Pair(torch.cat([eye, noise], 1), weight, bias, eye, ref_logits.t(), ref_bias, labels).to(dtype).to(device)


def fused(*arguments: Any, **options: Any) -> PolicyRefStats:
    return linear_policy_ref_stats(*arguments, **{"impl": "triton", "chunk": PIECE, **options})


class Run(NamedTuple):
    stats: PolicyRefStats
    gradients: list[Tensor]  # of hidden, weight and bias


def differentiate(
    function: Callable[..., PolicyRefStats], inputs: Pair, upstream: dict[str, Tensor], **options: Any
) -> Run:
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    stats = function(
        *leaves[:2],
        inputs.ref_hidden,
        inputs.ref_weight,
        inputs.labels,
        bias=leaves[2],
        ref_bias=inputs.ref_bias,
        **options,
    )
    outputs = [getattr(stats, name) for name in upstream]
    grads = [g.to(o) for g, o in zip(upstream.values(), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return Run(PolicyRefStats(*(s.detach() for s in stats)), list(gradients))


def upstream_for(names: tuple[str, ...] = DIFFERENTIABLE, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, generator=generator) for name in names}


def check(result: Run, inputs: Pair, upstream: dict[str, Tensor], **options: Any) -> None:
    """Statistics no worse than plain torch's from float32 logits, nearly; gradients by their largest element."""
    inputs = inputs.to("cpu")
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = differentiate(linear_policy_ref_stats_reference, inputs.to(torch.float64), upstream, **wide)
    plain = differentiate(linear_policy_ref_stats_reference, inputs, upstream, **options)
    for name in PolicyRefStats._fields:
        value, truth = getattr(result.stats, name), getattr(exact.stats, name)
        assert value.dtype == torch.float32
        assert error(value, truth) <= error(getattr(plain.stats, name), truth) + 1e-5, name
    rounding = 1e-2 if inputs.hidden.dtype == torch.bfloat16 else 1e-5
    for ours, theirs, truth in zip(result.gradients, plain.gradients, exact.gradients, strict=True):
        assert ours.dtype == inputs.hidden.dtype
        assert error(ours, truth) <= error(theirs, truth) + rounding * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("vocab", [7, VOCAB])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(
    device: str, dtype: torch.dtype, vocab: int, make: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    inputs, upstream = pair_of(make, vocab, dtype, device), upstream_for()
    if make is shifted_pair:
        inputs.hidden[:, 5:] = 0  # around 150 each sum of a product is rounded by 8e-6, in an order of torch's
    check(differentiate(fused, inputs, upstream), inputs, upstream)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_gradient_alone_with_a_temperature_of_each_row_and_softcap(device: str, name: str) -> None:
    inputs, upstream = pair_of(device=device), upstream_for((name,))
    options = {"temperature": torch.linspace(0.5, 1.5, 5, device=device), "softcap": 8.0}
    run = differentiate(fused, inputs, upstream, **options)
    check(run, inputs, upstream, **options)


@pytest.mark.parametrize("bias", BIASES[1:])
def test_tokens_that_both_lack(device: str, bias: Callable[[int], Tensor]) -> None:
    """A chunk without anything finite, the first, among them."""
    inputs, upstream = pair_of(biases=(bias, bias), device=device), upstream_for()
    upstream["logprob"].zero_()  # of a masked label it is -inf, whose gradient the reference makes NaN
    result = differentiate(fused, inputs, upstream)
    # As good as masked, and known to the reference's gradient.
    finite = inputs._replace(bias=inputs.bias.clamp(min=-300.0), ref_bias=inputs.ref_bias.clamp(min=-300.0))
    exact = differentiate(linear_policy_ref_stats_reference, finite.to("cpu").to(torch.float64), upstream)
    for name in ("entropy", "lse", "reverse_kl", "forward_kl"):
        assert error(getattr(result.stats, name), getattr(exact.stats, name)) <= 2e-5, name
    for ours, truth in zip(result.gradients, exact.gradients, strict=True):
        assert error(ours, truth) <= 1e-5 * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("masked", [whole_chunk_masked, scattered_masked, all_but_last_masked])
@pytest.mark.parametrize("side", [0, 1])
def test_tokens_that_one_lacks(device: str, side: int, masked: Callable[[int], Tensor]) -> None:
    """One divergence is infinite and passes no gradient, the other is finite and passes its own."""
    biases = (masked, unmasked) if side == 0 else (unmasked, masked)
    inputs, upstream = pair_of(biases=biases, device=device), upstream_for(("reverse_kl", "forward_kl"))
    result = differentiate(fused, inputs, upstream)
    infinite, finite = ("forward_kl", "reverse_kl") if side == 0 else ("reverse_kl", "forward_kl")
    assert getattr(result.stats, infinite).cpu().isinf().tolist() == [True, False, True, True, True]
    leaf = pair_logits(inputs).requires_grad_()
    ref_logits = torch.nn.functional.linear(*(t.double().cpu() for t in inputs[3:6]))
    kl = token_kl(leaf, ref_logits, kind=finite.removesuffix("_kl"))
    kept = inputs.labels.cpu() != -100
    assert error(getattr(result.stats, finite).cpu()[kept], kl[kept]) <= 2e-5
    (of_logits,) = torch.autograd.grad(kl, leaf, upstream[finite].double() * kept)
    truth = of_logits @ inputs.weight.double().cpu()
    assert error(result.gradients[0], truth) <= 1e-5 * max(1.0, float(truth.abs().max()))


def pair_logits(inputs: Pair) -> Tensor:
    return torch.nn.functional.linear(*(t.double().cpu() for t in inputs[:3]))


def test_equal_models_diverge_by_exactly_zero(device: str) -> None:
    inputs = pair_of(device=device)
    inputs = inputs._replace(ref_hidden=inputs.hidden, ref_weight=inputs.weight, ref_bias=inputs.bias)
    stats = differentiate(fused, inputs, upstream_for()).stats
    assert torch.equal(stats.logprob, stats.ref_logprob)
    for kl in (stats.reverse_kl, stats.forward_kl):
        assert not bool(kl.any())


@pytest.mark.parametrize("side", [0, 3])
def test_row_without_a_distribution_is_nan_alone(device: str, side: int) -> None:
    """Neither NaN in ignored rows, nor one in a row without upstream gradients, reaches a gradient."""
    inputs = pair_of(device=device)
    inputs[side][1:3, 1] = math.nan
    upstream = {name: torch.ones(5) for name in DIFFERENTIABLE}
    result = differentiate(fused, inputs, upstream)
    for statistic in (result.stats.reverse_kl, result.stats.forward_kl, result.gradients[0].sum(1)):
        assert statistic.isnan().tolist() == [False, False, True, False, False]
    for gradient in upstream.values():
        gradient[2] = 0
    silent = differentiate(fused, inputs, upstream)
    assert all(bool(gradient.isfinite().all()) for gradient in silent.gradients)
    assert not bool(silent.gradients[0][1:3].any())


@pytest.mark.parametrize("label", [-1, VOCAB, 2**40])
def test_label_outside_the_vocabulary_makes_its_row_nan_alone(device: str, label: int) -> None:
    inputs = pair_of(device=device)
    inputs.labels[2] = label
    result = differentiate(fused, inputs, upstream_for())
    for statistic in (*result.stats, result.gradients[0].sum(1)):
        assert statistic.isnan().tolist() == [False, False, True, False, False]


def test_chunks_do_not_change_the_bits(device: str) -> None:
    """Of logits that are exact in every order of the products."""
    inputs = pair_of(device=device)
    exact = {
        "weight": inputs.weight.round(),
        "bias": inputs.bias.round(),
        "ref_weight": inputs.ref_weight.round(),
        "ref_bias": inputs.ref_bias.round(),
    }
    inputs = inputs._replace(**exact)
    inputs.hidden[:, 5:] = 0
    one, all_ = (differentiate(fused, inputs, upstream_for(), chunk=chunk) for chunk in (PIECE, 3 * PIECE))
    for a, b in zip((*one.stats, *one.gradients[1:]), (*all_.stats, *all_.gradients[1:]), strict=True):
        assert torch.equal(a, b)


def test_no_rows_and_no_labels(device: str) -> None:
    inputs = pair_of(vocab=70, device=device)
    for rows in (slice(0, 0), slice(1, 2)):  # none; one, ignored
        part = inputs._replace(
            hidden=inputs.hidden[rows], ref_hidden=inputs.ref_hidden[rows], labels=inputs.labels[rows]
        )
        upstream = {name: torch.ones(len(part.labels)) for name in DIFFERENTIABLE}
        result = differentiate(fused, part, upstream)
        for value in (*result.stats, *result.gradients):
            assert not bool(value.any())


@pytest.mark.interpreter
def test_reads_both_chunks_once_and_writes_the_gradient_once() -> None:
    """Beside the rows the labels' logits alone; an ignored row is not read, but its gradient is written."""
    torch.manual_seed(3)
    logits, ref_logits, out = torch.randn(4, 700), torch.randn(4, 700), torch.empty(4, 700)
    rows = Rows(torch.tensor([PIECE, PIECE + 699, -100, 1]), None, 1.0, 0.0)  # the last in another chunk
    epilogue = TritonPairEpilogue(5000, -100, Block(64, 4, 4, 1))
    running = torch.zeros(9, 4, dtype=torch.float64)
    with count_traffic() as merge:
        epilogue.merge(logits, ref_logits, PIECE, rows, running)
    assert merge.launches == 1
    assert [merge.read(x) for x in (logits, ref_logits)] == [(3 * 700 + 2) * 4] * 2
    upstream = Upstream(None, None, None, torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.zeros(4))
    with count_traffic() as backward:
        epilogue.differentiate(logits, ref_logits, PIECE, rows, running, upstream, out)
    assert backward.launches == 1
    assert [backward.read(x) for x in (logits, ref_logits)] == [2 * 700 * 4] * 2
    assert backward.written(out) == 4 * 700 * 4


# What is broken, how, and the test that has to notice. The same tests pass above with the kernels as they are.
BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "the reference's maximum starts at 0": (
        "linear_policy_ref_stats",
        "q_max = tl.load(of_row + 4 * step).to(tl.float32)\n    q_others",
        "q_max = tl.maximum(tl.load(of_row + 4 * step).to(tl.float32), 0.0)\n    q_others",
        lambda: test_matches_float64("cpu", torch.float32, VOCAB, shifted_pair),
    ),
    "no mask on the last block of the reference": (
        "linear_policy_ref_stats",
        "q_block = last_block(ref_base, whole + columns, end, softcap, SOFTCAP)",
        "q_block = capped(tl.load(ref_base + columns, mask=columns < end, other=0.0), softcap, SOFTCAP)",
        lambda: test_matches_float64("cpu", torch.float32, VOCAB, near_pair),
    ),
    "a chunk forgets the divergence before": (
        "linear_policy_ref_stats",
        "q_over_p = tl.load(of_row + 8 * step).to(tl.float32)\n\n    end",
        "q_over_p = 0.0\n\n    end",
        lambda: test_matches_float64("cpu", torch.float32, VOCAB, unrelated_pair),
    ),
    "a part's divergence is not moved": (
        "_online_pair",
        "p_over_q += online_divergence_rebase(a_over_b, a_max, a_others, b_max, p_top, q_top, scale)",
        "p_over_q += a_over_b",
        lambda: test_matches_float64("cpu", torch.float32, VOCAB, rising_pair),
    ),
    "a divergence in logits": (
        "linear_policy_ref_stats",
        "tl.where(last & wanted, 1.0 / temperature, 1.0)",
        "1.0",
        lambda: test_each_gradient_alone_with_a_temperature_of_each_row_and_softcap("cpu", "reverse_kl"),
    ),
    "an infinite divergence has a gradient": (
        "linear_policy_ref_stats",
        "s = tl.where(infinite, 0.0, s)",
        "s = s",
        lambda: test_tokens_that_one_lacks("cpu", 1, scattered_masked),
    ),
    "infinite differences times 0": (
        "linear_policy_ref_stats",
        "tl.minimum(difference, _HUGE)",
        "difference",
        lambda: test_tokens_that_one_lacks("cpu", 1, scattered_masked),
    ),
    "the reverse gradient without the divergence": (
        "linear_policy_ref_stats",
        "- s * tl.where(infinite, 0.0, reverse_kl)",
        "",
        lambda: test_each_gradient_alone_with_a_temperature_of_each_row_and_softcap("cpu", "reverse_kl"),
    ),
    "the forward gradient of p alone": (
        "linear_policy_ref_stats",
        "row_other = -f * by_logit",
        "row_other = 0.0 * by_logit",
        lambda: test_each_gradient_alone_with_a_temperature_of_each_row_and_softcap("cpu", "forward_kl"),
    ),
    "the label like the others": (
        "linear_policy_ref_stats",
        "value = tl.where(start + columns == column, label_value, value)",
        "value = value",
        lambda: test_matches_float64("cpu", torch.float32, VOCAB, near_pair),
    ),
    "labels are not checked": (
        "linear_policy_ref_stats",
        "outside = wanted & ((label < 0) | (label >= vocab))",
        "outside = label != label",
        lambda: test_label_outside_the_vocabulary_makes_its_row_nan_alone("cpu", -1),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str) -> None:
    assert_noticed(*BREAKS[what])
