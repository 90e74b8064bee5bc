"""The Triton epilogues of linear_token_stats and linear_token_loss, through the public ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import BIASES, DTYPES, PIECE, VOCABULARIES, Problem, problem, unmasked, whole_chunk_masked
from torch import Tensor
from triton_cases import certain_logits, error, random_logits, shifted_logits, tied_logits
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import TokenStats, linear_token_loss, linear_token_stats
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_triton import TritonEpilogue
from irlfast.ops._triton import Block
from irlfast.ops.linear_token_loss import linear_token_loss_reference
from irlfast.ops.linear_token_stats import linear_token_stats_reference
from irlfast.ops.token_stats import token_stats_reference

MODES = ["recompute", "keep", "frozen", "fused"]
LOGITS = [random_logits, shifted_logits, certain_logits, tied_logits]


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the interpreter, or "cuda"; with the blocks of the table, of which a chunk has four on the CPU.

    In the interpreter mode="fused" has tiles that few rows, their depth and a vocabulary cross.
    """
    if request.param == "cpu":
        request.getfixturevalue("small_tiles")
    return str(request.param)


class Run(NamedTuple):
    stats: TokenStats
    gradients: dict[str, Tensor]


def differentiate(
    function: Callable[..., TokenStats], inputs: Problem, upstream: Tensor, sources: tuple[str, ...], **options: Any
) -> Run:
    """Statistics, and the gradients of their sum weighted by upstream [3, N]."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_(name in sources) for name in Problem._fields[:3]}
    stats = function(leaves["hidden"], leaves["weight"], inputs.labels, bias=leaves["bias"], **options)
    grads = [g.to(s) for g, s in zip(upstream, stats, strict=True)]
    gradients = torch.autograd.grad(list(stats), [leaves[name] for name in sources], grads)
    return Run(TokenStats(*(s.detach() for s in stats)), dict(zip(sources, gradients, strict=True)))


def sources_of(mode: str) -> tuple[str, ...]:
    return ("hidden",) if mode == "frozen" else ("hidden", "weight", "bias")


def ours(inputs: Problem, upstream: Tensor, mode: str, **options: Any) -> Run:
    options = {"impl": "triton", "mode": mode, "chunk": PIECE, **options}
    return differentiate(linear_token_stats, inputs, upstream, sources_of(mode), **options)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **options: Any) -> TokenStats:
    return token_stats_reference(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def check(result: Run, inputs: Problem, upstream: Tensor, mode: str, **options: Any) -> None:
    """Statistics no worse than from float32 logits, gradients no worse than eager's in the same type; nearly.

    Gradients are held to their largest element: each is a sum of products with weights of up to 150.
    """
    inputs, upstream = inputs.to("cpu"), upstream.cpu()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = differentiate(linear_token_stats_reference, inputs.to(torch.float64), upstream, sources_of(mode), **wide)
    from_float = differentiate(linear_token_stats_reference, inputs, upstream, sources_of(mode), **options)
    same_dtype = differentiate(eager, inputs, upstream, sources_of(mode), **options)
    for name in TokenStats._fields:
        value, truth = getattr(result.stats, name), getattr(exact.stats, name)
        assert value.dtype == torch.float32
        assert error(value, truth) <= error(getattr(from_float.stats, name), truth) + 1e-5, name
    for name, truth in exact.gradients.items():
        assert result.gradients[name].dtype == inputs.hidden.dtype
        # The logits' gradient is rounded where bfloat16 is multiplied as such, as it is in eager.
        tolerance = (1e-2 if inputs.hidden.dtype == torch.bfloat16 else 1e-5) * max(1.0, float(truth.abs().max()))
        assert error(result.gradients[name], truth) <= error(same_dtype.gradients[name], truth) + tolerance, name


def upstream_for(inputs: Problem) -> Tensor:
    """Of all three, the last row's zero."""
    upstream = torch.randn(3, len(inputs.labels), generator=torch.Generator().manual_seed(1))
    upstream[:, 4:5] = 0
    return upstream.to(inputs.labels.device)


@pytest.mark.parametrize("make", LOGITS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["recompute", "fused"])
def test_matches_float64(device: str, dtype: torch.dtype, vocab: int, make: Callable[..., Tensor], mode: str) -> None:
    inputs = problem(make, vocab, dtype, device)
    if make is shifted_logits:
        inputs.hidden[:, 5:] = 0  # around 150 each sum of a product is rounded by 8e-6, in an order of torch's
    upstream = upstream_for(inputs)
    check(ours(inputs, upstream, mode), inputs, upstream, mode)


@pytest.mark.parametrize("make", [random_logits, certain_logits])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_temperature_of_each_row_and_softcap(
    device: str, mode: str, dtype: torch.dtype, make: Callable[..., Tensor]
) -> None:
    inputs = problem(make, dtype=dtype, device=device)
    upstream = upstream_for(inputs)
    options = {"temperature": torch.linspace(0.5, 1.5, 5, device=device), "softcap": 10.0}
    check(ours(inputs, upstream, mode, **options), inputs, upstream, mode, **options)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens(device: str, mode: str, bias: Callable[[int], Tensor]) -> None:
    """A chunk without anything finite, the first; the label among what is masked."""
    inputs = problem(bias=bias, device=device)
    upstream = upstream_for(inputs)
    upstream[0, 2] = 0  # its label is masked: log-prob -inf, whose gradient only the reference makes NaN
    result = ours(inputs, upstream, mode)
    assert all(bool(gradient.isfinite().all()) for gradient in result.gradients.values())
    finite = inputs._replace(bias=inputs.bias.clamp(min=-300.0))  # as good as masked, and known to eager's gradient
    reference = inputs.labels == -100 if bias is unmasked else inputs.bias[inputs.labels.clamp(min=0)] == -math.inf
    exact = differentiate(
        linear_token_stats_reference, finite.to("cpu").to(torch.float64), upstream.cpu(), sources_of(mode)
    )
    assert error(result.stats.entropy, exact.stats.entropy) <= 1e-5
    assert error(result.stats.lse, exact.stats.lse) <= 1e-5
    kept = ~reference.cpu() | (inputs.labels.cpu() == -100)
    assert error(result.stats.logprob.cpu()[kept], exact.stats.logprob[kept]) <= 1e-5
    for name, truth in exact.gradients.items():
        assert error(result.gradients[name], truth) <= 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_row_without_a_distribution_is_nan_alone(device: str, mode: str) -> None:
    """And without an upstream gradient its own is 0, and reaches nothing."""
    inputs = problem(device=device)
    inputs.hidden[2, 5] = math.nan
    inputs.hidden[1] = math.nan  # ignored
    result = ours(inputs, torch.ones(3, 5, device=device), mode)
    for statistic in result.stats:
        assert statistic.isnan().tolist() == [False, False, True, False, False]
        assert float(statistic[1]) == 0
    assert bool(result.gradients["hidden"][2].isnan().all())
    assert not bool(result.gradients["hidden"][[0, 3, 4]].isnan().any())
    upstream = torch.ones(3, 5, device=device)
    upstream[:, 2] = 0
    silent = ours(inputs, upstream, mode)
    assert not bool(silent.gradients["hidden"][[1, 2]].any())
    assert all(bool(gradient.isfinite().all()) for gradient in silent.gradients.values())


@pytest.mark.parametrize("label", [-1, VOCABULARIES[-1], 2**40, -(2**40)])
@pytest.mark.parametrize("mode", MODES)
def test_label_outside_the_vocabulary_makes_its_row_nan_alone(device: str, mode: str, label: int) -> None:
    inputs = problem(device=device)
    inputs.labels[2] = label
    result = ours(inputs, torch.ones(3, 5, device=device), mode)
    for statistic in (*result.stats, result.gradients["hidden"].sum(1)):
        assert statistic.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_that_is_none_makes_its_row_nan(device: str, temperature: float) -> None:
    """Of an ignored row it is not looked at."""
    inputs = problem(vocab=7, device=device)
    temperatures = torch.ones(5, device=device)
    temperatures[1:3] = temperature
    result = ours(inputs, torch.ones(3, 5, device=device), "recompute", temperature=temperatures)
    for statistic in (*result.stats, result.gradients["hidden"].sum(1)):
        assert statistic.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("gap", [20.0, 40.0])
@pytest.mark.parametrize("mode", MODES)
def test_confident_token_keeps_its_digits(device: str, mode: str, gap: float) -> None:
    vocab = 2 * PIECE + 1
    weight = torch.zeros(vocab, 1, device=device)
    weight[2100] = gap
    hidden = torch.ones(1, 1, device=device, requires_grad=True)
    logprob = linear_token_stats(
        hidden, weight, torch.tensor([2100], device=device), impl="triton", mode=mode, chunk=PIECE
    ).logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    others = (vocab - 1) * math.exp(-gap)
    assert float(logprob.detach()) == pytest.approx(-math.log1p(others), rel=1e-5, abs=0)
    assert float(gradient) == pytest.approx(gap * others / (1 + others), rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_change_the_bits(device: str, dtype: torch.dtype) -> None:
    """Of kept logits, which the products of all chunks make alike: small integers are exact in every order."""
    inputs = problem(tied_logits, 2 * PIECE + 104, dtype, device, bias=lambda vocab: torch.zeros(vocab).double())
    inputs.hidden[:, 5:] = 0
    upstream = upstream_for(inputs)
    one, all_ = (ours(inputs, upstream, "recompute", chunk=chunk) for chunk in (PIECE, 3 * PIECE))
    for a, b in zip(one.stats, all_.stats, strict=True):
        assert torch.equal(a, b)
    for name in ("weight", "bias"):
        assert torch.equal(one.gradients[name], all_.gradients[name])


def test_a_row_has_the_same_bits_whatever_is_around_it(device: str) -> None:
    inputs = problem(tied_logits, 2 * PIECE + 104, device=device)
    inputs.hidden[:, 5:] = 0
    whole = ours(inputs, upstream_for(inputs), "recompute")
    part = ours(inputs.take(slice(2, 4)), upstream_for(inputs)[:, 2:4], "recompute")
    for a, b in zip(whole.stats, part.stats, strict=True):
        assert torch.equal(a[2:4], b)


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_and_no_labels(device: str, mode: str) -> None:
    inputs = problem(vocab=70, device=device)
    for rows in (slice(0, 0), slice(1, 2)):  # none; one, ignored
        part = inputs.take(rows)
        result = ours(part, torch.ones(3, len(part.labels), device=device), mode)
        for value in (*result.stats, *result.gradients.values()):
            assert not bool(value.any())


def test_rows_cross_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, the last block ragged."""
    from irlfast.ops import _linear_plan

    monkeypatch.setattr(_linear_plan, "_blocks", lambda *sizes: (2, PIECE))
    inputs = problem(device=device)
    upstream = upstream_for(inputs)
    options = {"temperature": torch.linspace(0.5, 1.5, 5, device=device)}
    for mode in MODES:
        check(ours(inputs, upstream, mode, **options), inputs, upstream, mode, **options)


def chunk_of(device: str, rows: int = 4, width: int = 700) -> tuple[Tensor, Rows, Tensor]:
    """Logits, what comes with them and the state [4, rows] that finish() would give: of the columns from 2048 on."""
    torch.manual_seed(3)
    logits = torch.randn(rows, width, device=device)
    labels = PIECE + torch.arange(rows, device=device) * 200
    state = torch.stack([logits.amax(1), torch.rand(rows, device=device), *torch.randn(2, rows, device=device)])
    return logits, Rows(labels, None, 0.7, 0.0), state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_logits_in_half_are_rounded_once(device: str, dtype: torch.dtype) -> None:
    logits, rows, state = chunk_of(device)
    epilogue = TritonEpilogue(5000, -100)
    upstream = Upstream(*torch.randn(3, 4, device=device))
    wide, narrow = torch.empty(4, 700, device=device), torch.empty(4, 700, device=device, dtype=dtype)
    for out in (wide, narrow):
        epilogue.differentiate(logits, PIECE, rows, state, upstream, out, row_numbers=None)
    assert error(narrow, wide, 2.0 ** (-7 if dtype == torch.bfloat16 else -10)) <= 1e-7
    for out in (wide, narrow):
        epilogue.exponentials(logits, PIECE, rows, state[0].double(), out)
    assert error(narrow, wide, 2.0 ** (-7 if dtype == torch.bfloat16 else -10)) <= 1e-7


def test_numbered_rows_and_in_place(device: str) -> None:
    logits, rows, state = chunk_of(device)
    epilogue = TritonEpilogue(5000, -100)
    upstream = Upstream(*torch.randn(3, 4, device=device))
    expected, part = torch.empty(4, 700, device=device), torch.empty(2, 700, device=device)
    epilogue.differentiate(logits, PIECE, rows, state, upstream, expected, row_numbers=None)
    which = torch.tensor([3, 1], device=device)
    epilogue.differentiate(
        logits, PIECE, rows.take(which), state[:, which], upstream.take(which), part, row_numbers=which
    )
    assert torch.equal(part, expected[which])
    epilogue.differentiate(logits, PIECE, rows, state, upstream, logits, row_numbers=None)
    assert torch.equal(logits, expected)


@pytest.mark.interpreter
def test_reads_and_writes_a_chunk_once() -> None:
    """Beside the rows the label's logit alone; an ignored row is not read, but its gradient is written."""
    logits, rows, state = chunk_of("cpu")
    rows.labels[2] = -100
    rows.labels[3] = 1  # in another chunk
    epilogue = TritonEpilogue(5000, -100, Block(64, 4, 4, 1))
    running = torch.zeros(4, 4, dtype=torch.float64)
    with count_traffic() as merge:
        epilogue.merge(logits, PIECE, rows, running, weighted=True)
    assert merge.launches == 1
    assert merge.read(logits) == (3 * 700 + 2) * 4
    upstream = Upstream(torch.tensor([1.0, 0.0, 1.0, 1.0]), None, None)
    out = torch.empty(4, 700)
    with count_traffic() as backward:
        epilogue.differentiate(logits, PIECE, rows, state, upstream, out, row_numbers=None)
    assert backward.launches == 1
    assert backward.read(logits) == 2 * 700 * 4
    assert backward.written(out) == 4 * 700 * 4


class Terms:
    """A loss with a weight and a curvature of its own for each row."""

    def __init__(self, device: str) -> None:
        self.weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).to(device)
        self.weights[:, 3] = 0

    def __call__(self, stats: TokenStats, rows: Tensor) -> Tensor:
        a, b, c = self.weights[:, rows].to(stats.logprob)
        return (a * stats.logprob + b * stats.entropy.square() + c * (0.1 * stats.lse).tanh()).sum()


@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_matches_float64(device: str, dtype: torch.dtype, block: int) -> None:
    inputs = problem(dtype=dtype, device=device)
    runs = []
    for function, given in (
        (linear_token_loss_reference, inputs.to("cpu").to(torch.float64)),
        (linear_token_loss_reference, inputs.to("cpu")),
        (linear_token_loss, inputs),
    ):
        leaves = [t.detach().requires_grad_() for t in given[:3]]
        options = (
            {"impl": "triton", "memory_budget": block * VOCABULARIES[-1] * 4, "chunk": PIECE}
            if function is linear_token_loss
            else {}
        )
        value = function(
            *leaves[:2], given.labels, Terms(given.hidden.device.type), bias=leaves[2], softcap=20.0, **options
        )
        runs.append((value.detach(), *torch.autograd.grad(value, leaves)))
    exact, plain, result = runs
    assert error(result[0], exact[0]) <= error(plain[0], exact[0]) + 1e-5
    # The logits' gradient is rounded where bfloat16 is multiplied as such, as it is in eager.
    tolerance = 5e-4 if dtype == torch.float32 else 1e-2
    for ours_, plain_, truth in zip(result[1:], plain[1:], exact[1:], strict=True):
        assert error(ours_, truth, tolerance) <= error(plain_, truth) + tolerance


# What is broken, how, and the test that has to notice. The same tests pass above with the kernels as they are.
BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "no mask on a chunk's last block": (
        "_rows",
        'tl.where(columns < end, logits, float("-inf"))',
        "logits",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], random_logits, "recompute"),
    ),
    "a chunk forgets those before": (
        "linear_token_stats",
        "others = tl.load(to_others).to(tl.float32)",
        "others = 0.0",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], random_logits, "recompute"),
    ),
    "a maximum of 0 before the first": (
        "linear_token_stats",
        "max = tl.load(to_max).to(tl.float32)",
        "max = tl.maximum(tl.load(to_max).to(tl.float32), 0.0)",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], shifted_logits, "recompute"),
    ),
    "an empty chunk is no special case": (
        "_online_softmax",
        "tl.where(max == _EMPTY, 0.0, max)",
        "max",
        lambda: test_masked_tokens("cpu", "recompute", whole_chunk_masked),
    ),
    "labels numbered within the chunk": (
        "linear_token_stats",
        "column = label - first_column",
        "column = label",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], random_logits, "recompute"),
    ),
    "bits for nats": (
        "linear_token_stats",
        "tl.where(first_column + width == vocab, LN_2, 1.0)",
        "1.0",
        lambda: test_matches_float64("cpu", torch.float32, PIECE, random_logits, "recompute"),
    ),
    "nats after every chunk": (
        "linear_token_stats",
        "tl.where(first_column + width == vocab, LN_2, 1.0)",
        "LN_2",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], random_logits, "recompute"),
    ),
    "labels are not checked": (
        "linear_token_stats",
        "outside = wanted & ((label < 0) | (label >= vocab))",
        "outside = label != label",
        lambda: test_label_outside_the_vocabulary_makes_its_row_nan_alone("cpu", "recompute", -1),
    ),
    "an ignored row is read": (
        "linear_token_stats",
        "end = tl.where(wanted, width, 0)",
        "end = width",
        lambda: test_row_without_a_distribution_is_nan_alone("cpu", "recompute"),
    ),
    "a row without a gradient gets one": (
        "linear_token_stats",
        "(label != ignore_index) & ((g != 0.0) | (h != 0.0) | (u != 0.0))",
        "label != ignore_index",
        lambda: test_reads_and_writes_a_chunk_once(),
    ),
    "an entropy without lse": (
        "_gradient",
        "u + h * (log_sum - entropy)",
        "u - h * entropy",
        lambda: test_matches_float64("cpu", torch.float32, VOCABULARIES[-1], random_logits, "recompute"),
    ),
    "1 - p by subtraction": (
        "_online_softmax",
        "tl.where(w == 1.0, y, tl.where(near, corrected, w - 1.0))",
        "w - 1.0",
        lambda: test_confident_token_keeps_its_digits("cpu", "recompute", 20.0),
    ),
    "the label among the exponentials": (
        "linear_token_stats",
        "value = tl.where(start + columns == column, label_value, value)",
        "value = value",
        lambda: test_confident_token_keeps_its_digits("cpu", "frozen", 20.0),
    ),
    "rows are not numbered": (
        "linear_token_stats",
        "source = tl.load(row_numbers + row)",
        "source = row",
        lambda: test_numbered_rows_and_in_place("cpu"),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str) -> None:
    assert_noticed(*BREAKS[what])
