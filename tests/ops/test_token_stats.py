from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from irlfast import _native
from irlfast.ops import TokenStats, token_logprobs, token_stats, token_stats_reference
from irlfast.ops._token_stats_cpu import backward_cpu, statistics_cpu
from irlfast.ops._token_stats_op import as_op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 1 and 7: shorter than a vector; 4093: ragged against every vector and block; 32000: whole blocks; 50257, 151936: more
# than one piece of 32768, ragged and whole.
VOCABULARIES = [1, 7, 4093, 32000, 50257, 151936]
ISAS = _native.build_info()["isas_usable"]

forward_cpu = as_op(statistics_cpu)


def random_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, vocab, dtype=torch.float64) * 3).to(dtype)


def peaked_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, vocab, dtype=torch.float64) * 30).to(dtype)


def shifted_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    shift = torch.where(torch.arange(rows) % 2 == 0, 150.0, -150.0)
    return (torch.randn(rows, vocab, dtype=torch.float64) * 3 + shift[:, None]).to(dtype)


def masked_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """-inf over the first 1100 logits, over scattered ones, and over everything but the last."""
    logits = random_logits(rows, vocab, dtype)
    kept = vocab - 1
    logits[0, : min(1100, kept)] = -math.inf
    logits[1::3, ::2][..., : max(vocab // 2, 0)] = -math.inf
    logits[2::3, :kept] = -math.inf
    logits[:, kept] = logits[:, kept].nan_to_num(neginf=0.0)
    return logits


def certain_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """One token 25 nats above the rest: 1 - p is about vocab * 1e-11."""
    logits = torch.randn(rows, vocab, dtype=torch.float64).clamp(-2, 2)
    logits[torch.arange(rows), torch.arange(rows) % vocab] = 27.0
    return logits.to(dtype)


INPUTS = [random_logits, peaked_logits, shifted_logits, masked_logits, certain_logits]


def labels_for(logits: Tensor) -> Tensor:
    """Random labels, the argmax among them."""
    labels = torch.randint(logits.shape[-1], logits.shape[:-1])
    labels[0] = logits[0].argmax()
    return labels


class Run(NamedTuple):
    stats: TokenStats
    gradient: Tensor


def differentiate(
    function: Callable[..., TokenStats], logits: Tensor, labels: Tensor, weights: Tensor, **kw: Any
) -> Run:
    """Statistics, and the gradient of their weighted sum; weights [3, ...] go to logprob, entropy, lse."""
    leaf = logits.detach().requires_grad_()
    stats = function(leaf, labels, **kw)
    # Vector-Jacobian products, not a loss: a log-prob of -inf has a gradient, and its weighted sum is no number.
    grads = [w.to(o.dtype) for o, w in zip(stats, weights, strict=True)]
    (gradient,) = torch.autograd.grad(list(stats), leaf, grads)
    return Run(TokenStats(*(s.detach() for s in stats)), gradient)


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities agree."""
    ours, exact = ours.double(), exact.double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = (ours - exact).abs().masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def assert_close_to_exact(ours: Run, logits: Tensor, labels: Tensor, weights: Tensor, **kw: Any) -> None:
    """No worse than plain torch in the statistics' own precision, by more than a hair.

    Stricter than eager in the logits' dtype: statistics of 16-bit logits are held to float32's error, and their
    gradient to the rounding of the result.
    """
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kw.items()}
    exact = differentiate(token_stats_reference, logits.double(), labels, weights.double(), **double)
    wide = logits.dtype == torch.float64
    eager = differentiate(token_stats_reference, logits if wide else logits.float(), labels, weights, **kw)
    tolerance = 1e-12 if wide else 1e-5
    for name in TokenStats._fields:
        bound = error(getattr(eager.stats, name), getattr(exact.stats, name)) + tolerance
        assert error(getattr(ours.stats, name), getattr(exact.stats, name)) <= bound, name
    tolerance = 1e-12 if wide else 2e-6
    bound = error(eager.gradient.to(logits.dtype), exact.gradient) + tolerance
    assert ours.gradient.dtype == logits.dtype
    assert error(ours.gradient, exact.gradient) <= bound


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, vocab: int, make: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    logits = make(3, vocab, dtype)
    labels = labels_for(logits)
    weights = torch.randn(3, 3)
    assert_close_to_exact(differentiate(token_stats, logits, labels, weights, impl="cpu"), logits, labels, weights)


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(
    isa: str, dtype: torch.dtype, make: Callable[..., Tensor], softcap: float | None
) -> None:
    torch.manual_seed(1)
    logits = make(6, 4093, dtype)
    labels = labels_for(logits)
    weights = torch.randn(3, 6)
    temperature = torch.rand(6) + 0.5
    wide = dtype == torch.float64
    scale = temperature.double() if wide else temperature
    *stats, state = forward_cpu(logits, labels, scale, 1.0, softcap or 0.0, -100, True, isa=isa)
    grads = [w.double() if wide else w for w in weights]
    gradient = backward_cpu(logits, labels, scale, 1.0, softcap or 0.0, -100, state, *grads, isa=isa)
    ours = Run(TokenStats(*stats), gradient)
    assert_close_to_exact(ours, logits, labels, weights, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_stay_within_the_published_bound(dtype: torch.dtype) -> None:
    """Logits of standard deviation 3 over a real vocabulary: log-prob within 1e-6, entropy within 7e-7 of float64."""
    torch.manual_seed(2)
    logits = random_logits(64, 50257, dtype)
    labels = logits.double().softmax(-1).multinomial(1).squeeze(1)
    ours = token_stats(logits, labels)
    exact = token_stats_reference(logits.double(), labels)
    assert error(ours.logprob, exact.logprob) <= 1e-6
    assert error(ours.entropy, exact.entropy) <= 7e-7


def test_gradcheck_through_all_outputs() -> None:
    torch.manual_seed(3)
    logits = (torch.randn(2, 3, 37, dtype=torch.float64) * 2).requires_grad_()
    labels = torch.randint(37, (2, 3))
    labels[1, 1] = -100
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5

    def all_outputs(x: Tensor) -> TokenStats:
        return token_stats(x, labels, temperature=temperature, softcap=4.0, impl="cpu")

    assert torch.autograd.gradcheck(all_outputs, logits)


def test_gradcheck_of_several_labels_a_row() -> None:
    torch.manual_seed(3)
    logits = (torch.randn(3, 11, dtype=torch.float64) * 2).requires_grad_()
    labels = torch.tensor([[0, 5, 5, 10], [3, -100, 3, 3], [-100, -100, -100, -100]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, labels, temperature=0.7, impl="cpu"), logits)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    logits = torch.randn(4, 19, requires_grad=True)
    labels = torch.randint(19, shape)
    row_temperature = torch.rand(4) + 0.5
    arguments = (logits, labels, row_temperature, 1.0, 5.0, -100, len(shape) == 1, False)
    torch.library.opcheck(torch.ops.irlfast.token_stats.default, arguments)
    state = torch.ops.irlfast.token_stats(*arguments)[3].detach()
    backward = (
        logits.detach(),
        labels,
        row_temperature,
        1.0,
        5.0,
        -100,
        state,
        torch.randn(shape),
        None,
        torch.randn(4),
    )
    torch.library.opcheck(torch.ops.irlfast.token_stats_backward.default, backward)
    torch.library.opcheck(torch.ops.irlfast.token_stats_backward_.default, backward)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch.manual_seed(5)
    torch.compiler.reset()

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        stats = token_stats(x * 2, y, temperature=t)
        return (stats.logprob + 0.1 * stats.entropy - stats.lse).sum() + token_logprobs(x, y).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        logits = torch.randn(rows, 41, requires_grad=True)
        labels = torch.randint(41, (rows,))
        temperature = torch.rand(rows) + 0.5
        value, expected = compiled(logits, labels, temperature), loss(logits, labels, temperature)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [4093, 100_003])  # rows shared out over threads; pieces of rows shared out
def test_a_row_has_the_same_bits_whatever_is_around_it(
    vocab: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(6)
    logits = random_logits(41, vocab, dtype)
    labels = labels_for(logits)
    weights = torch.randn(3, 41)
    threads(1)
    whole = differentiate(token_stats, logits, labels, weights)
    for count in (1, 2, 3):
        threads(count)
        for rows in (slice(0, 41), slice(0, 1), slice(7, 10), slice(40, 41)):
            part = differentiate(token_stats, logits[rows], labels[rows], weights[:, rows])
            for name in TokenStats._fields:
                assert torch.equal(getattr(part.stats, name), getattr(whole.stats, name)[rows]), (name, count, rows)
            assert torch.equal(part.gradient, whole.gradient[rows]), (count, rows)


def test_streamed_gradient_has_the_same_bits() -> None:
    """At 32 MiB the gradient is written past the caches, at addresses that need a vector's alignment."""
    torch.manual_seed(7)
    logits = random_logits(260, 33_001, torch.float32)
    labels = labels_for(logits)
    weights = torch.randn(3, 260)
    whole = differentiate(token_stats, logits, labels, weights)
    half = differentiate(token_stats, logits[:130], labels[:130], weights[:, :130])
    assert logits.nbytes >= 32 << 20 > half.gradient.nbytes
    assert torch.equal(whole.gradient[:130], half.gradient)


def test_more_than_2_to_the_31_logits() -> None:
    """Offsets and counts past 32 bits. Of 4 GiB of bfloat16 logits only the rows with a label are ever touched."""
    torch.manual_seed(26)
    vocab = 50_257
    logits = torch.empty(2**31 // vocab + 3, vocab, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    kept = [0, len(logits) // 2, len(logits) - 2, len(logits) - 1]
    labels = torch.full((len(logits),), -100)
    few_labels = labels[kept] = torch.randint(vocab, (4,))
    few = torch.randn(4, vocab).bfloat16()
    for row, values in zip(kept, few, strict=True):
        logits[row] = values
    stats, expected = token_stats(logits, labels), token_stats(few, few_labels)
    for name in TokenStats._fields:
        assert torch.equal(getattr(stats, name)[kept], getattr(expected, name)), name
        assert int(getattr(stats, name).count_nonzero()) == 4, name

    # The gradient of the first and the last row, written where they are.
    ends = logits.as_strided((2, vocab), (kept[-1] * vocab, 1))
    arguments = (few_labels[[0, 3]], None, 1.0, 0.0, -100)
    state = forward_cpu(ends, *arguments, True)[3]
    upstream = (torch.randn(2), torch.randn(2), torch.randn(2))
    gradient = backward_cpu(few[[0, 3]], *arguments, state, *upstream)
    backward_cpu(ends, *arguments, state, *upstream, gradient=ends)
    assert torch.equal(logits[kept[-1]], gradient[1])
    assert torch.equal(logits[0], gradient[0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_may_be_shuffled_and_logits_shifted(data: st.DataObject) -> None:
    """A permutation of the rows permutes the bits; a shift, exact here, moves the log-sum-exp and nothing else."""
    rows, vocab = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 300))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    # Multiples of 1/64 below 2^9: adding such a shift rounds nothing.
    logits = (torch.randn(rows, vocab) * 3 * 64).round() / 64
    labels, weights = torch.randint(vocab, (rows,)), torch.randn(3, rows)
    whole = differentiate(token_stats, logits, labels, weights)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    shuffled = differentiate(token_stats, logits[order], labels[order], weights[:, order])
    for name in TokenStats._fields:
        assert torch.equal(getattr(shuffled.stats, name), getattr(whole.stats, name)[order]), name
    assert torch.equal(shuffled.gradient, whole.gradient[order])

    shift = data.draw(st.integers(-400 * 64, 400 * 64)) / 64
    shifted = differentiate(token_stats, logits + shift, labels, weights)
    torch.testing.assert_close(shifted.stats.logprob, whole.stats.logprob, rtol=0, atol=2e-6)
    torch.testing.assert_close(shifted.stats.entropy, whole.stats.entropy, rtol=0, atol=2e-6)
    torch.testing.assert_close(shifted.stats.lse.double() - shift, whole.stats.lse.double(), rtol=0, atol=4e-5)
    torch.testing.assert_close(shifted.gradient, whole.gradient, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_gradient_accumulated_in_pieces_is_that_of_the_whole(pieces: int) -> None:
    """Micro-batches through a shared head, as a training step cuts them."""
    torch.manual_seed(27)
    hidden, labels = torch.randn(14, 16, dtype=torch.float64), torch.randint(300, (14,))
    heads = []
    for cuts in (1, pieces):
        head = torch.nn.Linear(16, 300, dtype=torch.float64)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(head.bias)
        for rows in torch.arange(14).chunk(cuts):
            stats = token_stats(head(hidden[rows]), labels[rows])
            (stats.logprob - 0.1 * stats.entropy + 0.01 * stats.lse.square()).sum().div(14).backward()
        heads.append(head)
    torch.testing.assert_close(heads[1].weight.grad, heads[0].weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(heads[1].bias.grad, heads[0].bias.grad, rtol=1e-12, atol=1e-14)


def test_ratio_to_itself_is_exactly_one() -> None:
    torch.manual_seed(8)
    logits = random_logits(9, 50257, torch.float32)
    labels = labels_for(logits)
    old = token_stats(logits, labels).logprob
    assert torch.equal((token_logprobs(logits[3:], labels[3:]) - old[3:]).exp(), torch.ones(6))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_ignored_rows_are_zero_and_pass_no_gradient(impl: str) -> None:
    torch.manual_seed(9)
    logits = torch.randn(4, 50)
    logits[1] = math.nan
    logits[3] = -math.inf
    labels = torch.tensor([3, -1, 49, -1])
    run = differentiate(token_stats, logits, labels, torch.ones(3, 4), ignore_index=-1, impl=impl)
    for statistic in run.stats:
        assert torch.equal(statistic[[1, 3]], torch.zeros(2))
        assert statistic[[0, 2]].isfinite().all()
    assert torch.equal(run.gradient[[1, 3]], torch.zeros(2, 50))
    assert (run.gradient[[0, 2]] != 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_label_outside_the_vocabulary_is_named(impl: str) -> None:
    logits = torch.zeros(2, 3, 5)
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 7
    with pytest.raises(IndexError, match=r"labels\[1, 2\] = 7 is outside \[0, 5\)"):
        token_stats(logits, labels, impl=impl)
    labels[1, 2] = -1
    with pytest.raises(IndexError, match=r"labels\[1, 2\] = -1 is outside"):
        token_logprobs(logits, labels, impl=impl)
    assert token_stats(logits, labels, ignore_index=-1, impl=impl).logprob[1, 2] == 0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("vocab", [5, 70_001])
def test_row_without_a_distribution_is_nan_alone(vocab: int, bad: float, impl: str) -> None:
    torch.manual_seed(10)
    logits = torch.randn(3, vocab)
    expected = token_stats(logits, torch.zeros(3, dtype=torch.long), impl=impl)
    logits[1] = bad
    run = differentiate(token_stats, logits, torch.zeros(3, dtype=torch.long), torch.ones(3, 3), impl=impl)
    for name in TokenStats._fields:
        assert getattr(run.stats, name)[1].isnan()
        assert torch.equal(getattr(run.stats, name)[::2], getattr(expected, name)[::2])
    assert run.gradient[1].isnan().any()
    assert run.gradient[::2].isfinite().all()


@pytest.mark.parametrize("position", [0, 40, 63, 64, 4092])
@pytest.mark.parametrize("isa", ISAS)
def test_one_nan_logit_is_not_lost(isa: str, position: int) -> None:
    torch.manual_seed(11)
    logits = torch.randn(1, 4093)
    logits[0, position] = math.nan
    logprob, entropy, lse, _ = forward_cpu(logits, torch.tensor([5]), None, 1.0, 0.0, -100, True, isa=isa)
    assert logprob.isnan()
    assert entropy.isnan()
    assert lse.isnan()


def test_infinite_logit_gives_nan() -> None:
    logits = torch.zeros(1, 9)
    logits[0, 4] = math.inf
    assert all(s.isnan() for s in token_stats(logits, torch.tensor([2])))


def test_zero_upstream_gives_zero_gradient_even_where_the_row_is_nan() -> None:
    logits = torch.zeros(2, 6)
    logits[0] = -math.inf
    run = differentiate(token_stats, logits, torch.tensor([1, 1]), torch.tensor([[0.0, 1.0]] * 3), impl="cpu")
    assert torch.equal(run.gradient[0], torch.zeros(6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_confident_token_keeps_its_digits(gap: float, isa: str) -> None:
    """lse - z loses everything past 16 nats in float32; log1p of the others, and expm1 for the gradient, do not."""
    logits = torch.zeros(1, 1000)
    logits[0, 17] = gap
    label = torch.tensor([17])
    exact_logprob = -math.log1p(999 * math.exp(-gap))
    logprob, _, _, state = forward_cpu(logits, label, None, 1.0, 0.0, -100, True, isa=isa)
    assert float(logprob) == pytest.approx(exact_logprob, rel=2e-6)
    gradient = backward_cpu(logits, label, None, 1.0, 0.0, -100, state, torch.ones(1), None, None, isa=isa)
    assert float(gradient[0, 17]) == pytest.approx(-math.expm1(exact_logprob), rel=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_masked_token_has_probability_and_gradient_exactly_zero(isa: str) -> None:
    torch.manual_seed(12)
    logits = torch.randn(2, 5000)
    logits[:, :1100] = -math.inf
    logits[:, 4999] = -math.inf
    labels = torch.tensor([3000, 4999])
    logprob, entropy, lse, state = forward_cpu(logits, labels, None, 1.0, 0.0, -100, True, isa=isa)
    ones = torch.ones(2)
    gradient = backward_cpu(logits, labels, None, 1.0, 0.0, -100, state, ones, ones, ones, isa=isa)
    assert torch.equal(gradient[:, :1100], torch.zeros(2, 1100))
    assert gradient[0, 4999] == 0
    assert logprob[1] == -math.inf
    assert gradient[1, 4999] == 1  # its own log-prob rises with it, one for one
    kept = token_stats(logits[:, 1100:4999], labels - 1100, ignore_index=3899)
    torch.testing.assert_close(kept.entropy[0], entropy[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(kept.lse[0], lse[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [5, 4093, 40_000])
def test_rows_masked_with_the_lowest_finite_number(vocab: int, isa: str, dtype: torch.dtype) -> None:
    """Times log2(e) that number overflows; a whole row of it is uniform, a prefix of it counts for nothing."""
    torch.manual_seed(25)
    lowest = torch.finfo(dtype).min
    logits = torch.randn(4, vocab).to(dtype)
    logits[0] = lowest
    logits[1, : vocab - 2] = lowest
    logits[2] += torch.tensor(2.0**30, dtype=torch.float64).to(dtype)
    logits[3] = torch.tensor(2.0**21).to(dtype) + torch.arange(vocab).to(dtype) % 2
    labels = torch.tensor([1, vocab - 1, vocab - 2, 0])
    *stats, _ = forward_cpu(logits, labels, None, 1.0, 0.0, -100, True, isa=isa)
    exact = token_stats_reference(logits.double(), labels)
    for ours, expected in zip(stats, exact, strict=True):
        torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_16_bit_value_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """With one token in the vocabulary the log-sum-exp is the logit."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()]
    labels = torch.zeros(len(values), dtype=torch.long)
    lse = forward_cpu(values[:, None], labels, None, 1.0, 0.0, -100, True, isa=isa)[2]
    assert torch.equal(lse, values.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gradient_is_rounded_to_nearest(isa: str, dtype: torch.dtype) -> None:
    """With all the mass on one token, its gradient of the log-sum-exp is the upstream gradient, rounded once."""
    torch.manual_seed(13)
    upstream = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16  # halfway between neighbours of either format
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 6.1e-5, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01, 3.4e38])
    halfway = [(ties | 0x8000).view(torch.float32), (ties | 0x1000).view(torch.float32)]
    upstream = torch.cat([upstream, *halfway, edges, -edges])
    upstream = upstream[upstream.isfinite() & ((upstream.abs() >= 1.2e-38) | (upstream == 0))]
    logits = torch.tensor([0.0, -math.inf]).to(dtype).repeat(len(upstream), 1)
    labels = torch.ones(len(upstream), dtype=torch.long)
    state = forward_cpu(logits, labels, None, 1.0, 0.0, -100, True, isa=isa)[3]
    grad_lse = upstream.to(state.dtype)
    gradient = backward_cpu(logits, labels, None, 1.0, 0.0, -100, state, None, None, grad_lse, isa=isa)
    assert torch.equal(gradient[:, 0], upstream.to(dtype))


def _layouts() -> dict[str, Callable[[], Tensor]]:
    base = torch.Generator().manual_seed(14)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=base)

    return {
        "slice of positions": lambda: randn(3, 5, 70)[:, :-1],
        "slice of vocabulary": lambda: randn(3, 4, 100)[..., 13:83],
        "transposed rows": lambda: randn(4, 3, 70).transpose(0, 1),
        "every other row": lambda: randn(6, 4, 70)[::2],
        "three strides": lambda: randn(3, 4, 4, 70)[:, ::2, ::2].reshape(3, 4, 70),
        "three strides, four dimensions": lambda: randn(3, 4, 5, 70)[::2, ::2, ::2],
        "expanded rows": lambda: randn(3, 1, 70).expand(3, 4, 70),
        "expanded vocabulary": lambda: randn(3, 4, 1).expand(3, 4, 70),
        "vocabulary not adjacent": lambda: randn(3, 70, 4).transpose(1, 2),
        "one row": lambda: randn(70),
        "unaligned": lambda: randn(12 * 70 + 1)[1:].view(3, 4, 70),
    }


@pytest.mark.parametrize("name", list(_layouts()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(name: str, dtype: torch.dtype) -> None:
    logits = _layouts()[name]().to(dtype) if name != "expanded rows" else _layouts()[name]()
    torch.manual_seed(15)
    labels = torch.randint(70, logits.shape[:-1])
    weights = torch.randn(3, *logits.shape[:-1])
    strided = differentiate(token_stats, logits, labels, weights, impl="cpu")
    packed = differentiate(token_stats, logits.contiguous(), labels, weights, impl="cpu")
    for name_ in TokenStats._fields:
        assert torch.equal(getattr(strided.stats, name_), getattr(packed.stats, name_))
    assert torch.equal(strided.gradient, packed.gradient)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    stats = token_stats(logits, torch.zeros(shape[:-1], dtype=torch.long), impl="cpu")
    assert stats.logprob.shape == stats.entropy.shape == stats.lse.shape == shape[:-1]
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_labels(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(16))
    labels = torch.tensor([0, 29, 3, 4])
    assert torch.equal(token_logprobs(logits, labels.to(dtype)), token_logprobs(logits, labels))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_several_labels_match_one_at_a_time(impl: str) -> None:
    torch.manual_seed(17)
    logits = torch.randn(2, 3, 60)
    labels = torch.randint(60, (2, 3, 5))
    labels[0, 0] = torch.tensor([7, 7, -100, 7, 0])
    several = token_logprobs(logits, labels, temperature=1.7, impl=impl)
    single = torch.stack([token_logprobs(logits, labels[..., k], temperature=1.7, impl=impl) for k in range(5)], dim=-1)
    assert several.shape == labels.shape
    assert torch.equal(several, single)
    grads = []
    for value in (several, single):
        leaf = logits.detach().requires_grad_()
        value = (
            token_logprobs(leaf, labels, temperature=1.7, impl=impl)
            if value is several
            else torch.stack([token_logprobs(leaf, labels[..., k], temperature=1.7, impl=impl) for k in range(5)], -1)
        )
        (value * torch.linspace(-1, 2, 30).view(2, 3, 5)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=2e-6)


def test_temperature_as_tensor_equals_number() -> None:
    torch.manual_seed(18)
    logits, labels = torch.randn(2, 3, 40), torch.randint(40, (2, 3))
    number = token_stats(logits, labels, temperature=0.5)
    for temperature in (torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 1), 0.5, dtype=torch.float64)):
        for ours, expected in zip(token_stats(logits, labels, temperature=temperature), number, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature = 0.0 is not a positive finite number"),
        ({"temperature": math.nan}, ValueError, "temperature = nan"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature of row 1 = -2.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"shape \(3,\) does not broadcast to the rows \(2,\)"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature requires grad"),
        ({"softcap": -1.0}, ValueError, "softcap = -1.0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels have shape \(3,\), expected \(2,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels are torch.float32, expected integers"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "logits are torch.int32"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "empty vocabulary"),
        ({"logits": torch.tensor(1.0)}, ValueError, "at least one dimension"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], exception: type[Exception], message: str, impl: str
) -> None:
    defaults: dict[str, Any] = {"logits": torch.zeros(2, 5), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(exception, match=message):
        token_stats(**{**defaults, **arguments}, impl=impl)


def test_unavailable_implementations_say_why() -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    for impl, reason in (
        ("cuda", "the kernel runs on GPUs of NVIDIA|built without CUDA kernels"),
        ("triton", "the tensor is on the CPU|not installed"),
    ):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available: .*({reason})"):
            token_stats(logits, labels, impl=impl)
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        token_stats(logits, labels, impl="fast")
    with pytest.raises(RuntimeError, match="impl='cpu' is not available: the tensor is on meta"):
        token_stats(logits.to("meta"), labels.to("meta"), impl="cpu")
    with pytest.raises(ValueError, match='isa="sse9" is not built in'):
        forward_cpu(logits, labels, None, 1.0, 0.0, -100, True, isa="sse9")


def test_native_code_refuses_null_and_nonsense() -> None:
    layout = (1, 2, 0, 5)
    arguments: list[Any] = [0, 0, layout, 5, 0, 1, -100, 1.0, 0, 0.0, 0, 0, 0, 0, 1, "auto"]
    with pytest.raises(ValueError, match="logits is a null pointer"):
        _native.token_stats_forward(*arguments)
    with pytest.raises(ValueError, match="dtype code 9 is unknown"):
        _native.token_stats_forward(*[arguments[0], 9, *arguments[2:]])
    with pytest.raises(ValueError, match="vocab = 0 is below 1"):
        _native.token_stats_forward(*[*arguments[:3], 0, *arguments[4:]])


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    logprob = token_stats(logits, torch.tensor([1, 2]), impl="cpu").logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_default_device_does_not_move_the_outputs() -> None:
    logits, labels = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2])
    with torch.device("meta"):
        stats = token_stats(logits, labels)
        (gradient,) = torch.autograd.grad(stats.entropy, logits, torch.ones(2, device="cpu"))
    assert all(s.device.type == "cpu" for s in (*stats, gradient))


def test_traced_as_one_op() -> None:
    """A dispatch mode sees the op: the short way around the dispatcher is not taken where somebody watches."""
    traced = make_fx(lambda x, y: token_stats(x, y).logprob)(torch.randn(2, 5), torch.tensor([1, 2]))
    assert torch.ops.irlfast.token_stats.default in [node.target for node in traced.graph.nodes]


def test_functional_transforms_take_the_reference() -> None:
    torch.manual_seed(24)
    logits, labels = torch.randn(3, 20), torch.randint(20, (3,))

    def entropy(x: Tensor, impl: str) -> Tensor:
        return token_stats(x, labels, impl=impl).entropy.sum()

    expected = differentiate(token_stats, logits, labels, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 3)).gradient
    torch.testing.assert_close(torch.func.grad(entropy)(logits, "auto"), expected)
    with pytest.raises(RuntimeError, match=r"impl='cpu' is not available: a torch.func transform is active"):
        torch.func.grad(entropy)(logits, "cpu")


def test_tensor_that_outlived_its_transform() -> None:
    """It wraps the tensor that has the data."""
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    logits, labels = torch.randn(3, 20), torch.tensor([1, 2, 3])
    torch.func.grad(function)(logits)
    expected = token_stats(logits, labels)
    with torch.no_grad():
        assert torch.equal(token_stats(kept[0], labels).entropy, expected.entropy)
    assert torch.equal(token_stats(kept[0], labels).entropy, expected.entropy)


def test_nothing_is_kept_without_grad() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        stats = token_stats(logits, torch.tensor([1, 2]))
    assert all(s.grad_fn is None and not s.requires_grad for s in stats)


def test_unused_outputs_cost_nothing_in_the_gradient() -> None:
    """Any one output alone has the gradient it has beside the others."""
    torch.manual_seed(19)
    logits, labels = torch.randn(3, 50, dtype=torch.float64), torch.randint(50, (3,))
    for i in range(3):
        weights = torch.zeros(3, 3)
        weights[i] = 1
        leaf = logits.clone().requires_grad_()
        (alone,) = torch.autograd.grad(token_stats(leaf, labels)[i].sum(), leaf)
        expected = differentiate(token_stats_reference, logits, labels, weights).gradient
        torch.testing.assert_close(alone, expected)


class TestInplaceBackward:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(6, 4093), (2, 3, 515), (1, 70_001)])
    def test_gradient_lands_in_the_logits(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        torch.manual_seed(20)
        values = random_logits(math.prod(shape[:-1]), shape[-1], dtype).view(shape)
        labels = torch.randint(shape[-1], shape[:-1])
        weights = torch.randn(3, *shape[:-1])
        expected = differentiate(token_stats, values, labels, weights).gradient
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        stats = token_stats(logits, labels, inplace_backward=True)
        (gradient,) = torch.autograd.grad(stats, logits, [w.to(s.dtype) for w, s in zip(weights, stats, strict=True)])
        assert gradient.data_ptr() == logits.data_ptr()
        assert torch.equal(gradient, expected)

    def test_reaches_the_leaf_through_a_slice(self) -> None:
        torch.manual_seed(21)
        hidden, head = torch.randn(2, 5, 8), torch.randn(30, 8, requires_grad=True)
        labels = torch.randint(30, (2, 4))
        grads = []
        for inplace in (False, True):
            logits = (hidden @ head.T)[:, :-1]
            loss = token_logprobs(logits, labels, inplace_backward=inplace).sum()
            grads.append(torch.autograd.grad(loss, head)[0])
        assert torch.equal(*grads)

    def test_several_labels_with_repeats(self) -> None:
        torch.manual_seed(22)
        values, labels = torch.randn(4, 40), torch.tensor([[3, 3, 39]] * 4)
        grads = []
        for inplace in (False, True):
            logits = values.clone().requires_grad_() * 1
            (g,) = torch.autograd.grad(token_logprobs(logits, labels, inplace_backward=inplace).sum(), logits)
            grads.append(g.clone())
        assert torch.equal(*grads)

    def test_second_backward_is_caught(self) -> None:
        logits = torch.randn(2, 5, requires_grad=True) * 1
        loss = token_logprobs(logits, torch.tensor([1, 2]), inplace_backward=True).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_other_reader_of_the_logits_is_caught(self) -> None:
        logits = torch.randn(2, 5, requires_grad=True).exp()  # exp keeps its result for its own gradient
        loss = token_logprobs(logits, torch.tensor([1, 2]), inplace_backward=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_impossible_requests_are_refused(self) -> None:
        labels = torch.tensor([1, 2])
        leaf = torch.randn(2, 5, requires_grad=True)
        with pytest.raises(ValueError, match="inplace_backward on a leaf"):
            token_stats(leaf, labels, inplace_backward=True)
        with pytest.raises(ValueError, match="scattered or overlap"):
            token_stats((leaf * 1)[:1].expand(2, 5), labels, inplace_backward=True)
        with pytest.raises(ValueError, match="scattered or overlap"):
            token_stats((torch.randn(5, 2, requires_grad=True) * 1).T, labels, inplace_backward=True)
        with pytest.raises(RuntimeError, match="needs a fused kernel"):
            token_stats(leaf * 1, labels, inplace_backward=True, impl="reference")

    @pytest.mark.parametrize("isa", ISAS)
    def test_every_instruction_set(self, isa: str) -> None:
        torch.manual_seed(23)
        logits, labels = torch.randn(3, 1001), torch.randint(1001, (3,))
        state = forward_cpu(logits, labels, None, 1.0, 0.0, -100, True, isa=isa)[3]
        arguments = (labels, None, 1.0, 0.0, -100, state, torch.randn(3), torch.randn(3), None)
        expected = backward_cpu(logits, *arguments, isa=isa)
        backward_cpu(logits, *arguments, gradient=logits, isa=isa)
        assert torch.equal(logits, expected)
