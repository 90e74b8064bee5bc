"""The Triton token_stats, through the public op."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import (
    BIG,
    LOGITS,
    VOCABULARIES,
    certain_logits,
    error,
    masked_logits,
    random_logits,
    rounding,
    shifted_logits,
    tied_logits,
)
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import TokenStats, token_logprobs, token_stats, token_stats_reference

DTYPES = [torch.float32, torch.bfloat16]


class Run(NamedTuple):
    stats: TokenStats
    gradient: Tensor


def differentiate(
    function: Callable[..., TokenStats], logits: Tensor, labels: Tensor, weights: Tensor, **kw: Any
) -> Run:
    """Statistics, and the vector-Jacobian product with weights [3, ...] of logprob, entropy, lse."""
    leaf = logits.detach().requires_grad_()
    stats = function(leaf, labels, **kw)
    (gradient,) = torch.autograd.grad(list(stats), leaf, [w.to(s) for w, s in zip(weights, stats, strict=True)])
    return Run(TokenStats(*(s.detach() for s in stats)), gradient)


def check(ours: Run, logits: Tensor, labels: Tensor, weights: Tensor, device: str, **kw: Any) -> None:
    """No worse than plain torch in float32, by more than a hair; the gradient, rounded to the logits' dtype."""
    logits, labels, weights = logits.cpu(), labels.cpu(), weights.cpu()
    kw = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kw.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in kw.items()}
    exact = differentiate(token_stats_reference, logits.double(), labels, weights, **wide)
    eager = differentiate(token_stats_reference, logits.float(), labels, weights, **kw)
    for name in TokenStats._fields:
        assert getattr(ours.stats, name).dtype == torch.float32
        bound = error(getattr(eager.stats, name), getattr(exact.stats, name)) + 1e-5
        assert error(getattr(ours.stats, name), getattr(exact.stats, name)) <= bound, name
    assert ours.gradient.dtype == logits.dtype
    bound = error(eager.gradient, exact.gradient) + 2e-6
    assert error(ours.gradient, exact.gradient, rounding(logits.dtype, device)) <= bound


def labels_of(logits: Tensor) -> Tensor:
    """Random labels, the argmax of the first row among them."""
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], device=logits.device)
    labels[0] = logits[0].argmax()
    return labels


@pytest.mark.parametrize("make", LOGITS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_matches_float64(device: str, dtype: torch.dtype, vocab: int, make: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    logits = make(4, vocab).to(device, dtype)
    labels, weights = labels_of(logits), torch.randn(3, 4, device=device)
    ours = differentiate(token_stats, logits, labels, weights, impl="triton")
    check(ours, logits, labels, weights, device)


@pytest.mark.gpu
@pytest.mark.parametrize("make", LOGITS)
@pytest.mark.parametrize("vocab", BIG)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_matches_float64_in_real_sizes(dtype: torch.dtype, vocab: int, make: Callable[..., Tensor]) -> None:
    test_matches_float64("cuda", dtype, vocab, make)


@pytest.mark.parametrize("make", LOGITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_of_each_row_and_softcap(device: str, dtype: torch.dtype, make: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    logits = make(4, 131).to(device, dtype)
    labels, weights = labels_of(logits), torch.randn(3, 4, device=device)
    options = {"temperature": torch.rand(4, device=device) + 0.5, "softcap": 10.0}
    check(
        differentiate(token_stats, logits, labels, weights, impl="triton", **options),
        logits,
        labels,
        weights,
        device,
        **options,
    )


def test_temperature_as_tensor_equals_number(device: str) -> None:
    torch.manual_seed(2)
    logits = random_logits(3, 70).to(device, torch.float32)
    labels = labels_of(logits)
    number = token_stats(logits, labels, temperature=0.7, impl="triton")
    tensor = token_stats(logits, labels, temperature=torch.tensor(0.7, device=device), impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 80.0])
def test_confident_token_keeps_its_digits(device: str, gap: float) -> None:
    """log p and 1 - p of the argmax, relative: both are far below float32's spacing at 1."""
    logits = torch.zeros(1, 131, device=device)
    logits[0, 100] = gap
    logits.requires_grad_()
    logprob = token_stats(logits, torch.tensor([100], device=device), impl="triton").logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    logprob = logprob.detach()
    others = 130 * math.exp(-gap)
    assert float(logprob) == pytest.approx(-math.log1p(others), rel=1e-5, abs=0)
    assert float(gradient[0, 100]) == pytest.approx(others / (1 + others), rel=1e-5, abs=0)


def test_ignored_rows_are_zero_and_not_read(device: str) -> None:
    logits = torch.full((3, 70), math.nan, device=device)
    logits[1] = torch.randn(70)
    labels = torch.tensor([-100, 3, -100], device=device)
    run = differentiate(token_stats, logits, labels, torch.ones(3, 3, device=device), impl="triton")
    for statistic in (*run.stats, run.gradient):
        assert bool((statistic[[0, 2]] == 0).all())
        assert bool((statistic[1] != 0).any())
        assert bool(statistic[1].isfinite().all())


@pytest.mark.parametrize("label", [-1, 70, 2**40, -(2**40)])
def test_label_outside_the_vocabulary_makes_its_row_nan_alone(device: str, label: int) -> None:
    torch.manual_seed(3)
    logits = random_logits(3, 70).to(device, torch.float32)
    labels = torch.tensor([5, label, 69], device=device)
    run = differentiate(token_stats, logits, labels, torch.ones(3, 3, device=device), impl="triton")
    for statistic in (*run.stats, run.gradient):
        assert bool(statistic[1].isnan().all())
        assert not bool(statistic[[0, 2]].isnan().any())


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("vocab", [5, 131])
def test_row_without_a_distribution_is_nan_alone(device: str, vocab: int, bad: float) -> None:
    logits = torch.zeros(3, vocab, device=device)
    logits[1] = bad
    labels = torch.zeros(3, dtype=torch.long, device=device)
    run = differentiate(token_stats, logits, labels, torch.ones(3, 3, device=device), impl="triton")
    for statistic in (*run.stats, run.gradient):
        assert bool(statistic[1].isnan().all())
        assert not bool(statistic[[0, 2]].isnan().any())


@pytest.mark.parametrize("position", [0, 63, 64, 69])
@pytest.mark.parametrize("rest", [0.0, -math.inf])
def test_one_nan_logit_is_not_lost(device: str, position: int, rest: float) -> None:
    logits = torch.full((1, 70), rest, device=device)
    logits[0, 40] = 1.0
    logits[0, position] = math.nan
    stats = token_stats(logits, torch.tensor([40], device=device), impl="triton")
    assert all(bool(s.isnan().all()) for s in stats)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_that_is_none_makes_its_row_nan(device: str, temperature: float) -> None:
    temperatures = torch.tensor([1.0, temperature], device=device)
    stats = token_stats(
        torch.zeros(2, 7, device=device),
        torch.zeros(2, dtype=torch.long, device=device),
        temperature=temperatures,
        impl="triton",
    )
    for statistic in stats:
        assert statistic.isnan().tolist() == [False, True]


def test_zero_upstream_gives_zero_gradient_even_where_the_row_is_nan(device: str) -> None:
    logits = torch.full((2, 70), math.nan, device=device, requires_grad=True)
    stats = token_stats(logits, torch.tensor([1, 2], device=device), impl="triton")
    (gradient,) = torch.autograd.grad(list(stats), logits, [torch.zeros(2, device=device)] * 3)
    assert torch.equal(gradient, torch.zeros(2, 70, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_token_has_probability_and_gradient_exactly_zero(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    logits = random_logits(2, 131).to(device, dtype)
    masked = torch.rand(2, 131, device=device) < 0.5
    masked[:, 7] = False
    logits[masked] = -math.inf
    run = differentiate(token_stats, logits, torch.tensor([7, 7]).to(device), torch.ones(3, 2), impl="triton")
    assert bool((run.gradient[masked] == 0).all())
    kept = [row[~m] for row, m in zip(logits.double().cpu(), masked.cpu(), strict=True)]
    for row, entropy in zip(kept, run.stats.entropy, strict=True):
        assert float(entropy) == pytest.approx(float(torch.distributions.Categorical(logits=row).entropy()), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_masked_with_the_lowest_finite_number(device: str, dtype: torch.dtype) -> None:
    logits = torch.full((1, 131), torch.finfo(dtype).min, device=device, dtype=dtype)
    logits[0, 100], logits[0, 101] = 1.0, 2.0
    labels, weights = torch.tensor([100], device=device), torch.ones(3, 1, device=device)
    run = differentiate(token_stats, logits, labels, weights, impl="triton")
    check(run, logits, labels, weights, device)


def _layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Views of [2, 4, 80] as [rows..., V]."""
    return {
        "slice of the sequence": lambda x: x[:, :-1],
        "slice of the vocabulary": lambda x: x[..., 3:74],
        "every other row": lambda x: x[:, ::2],
        "transposed rows": lambda x: x.transpose(0, 1),
        "one row for all": lambda x: x[:1, :1].expand(2, 3, 80),
        "vocabulary not adjacent": lambda x: x.transpose(1, 2),
        "one logit for the row": lambda x: x[..., :1].expand(2, 4, 40),
    }


@pytest.mark.parametrize("layout", list(_layouts()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(5)
    view = _layouts()[layout](random_logits(8, 80).view(2, 4, 80).to(device, dtype))
    labels = torch.randint(view.shape[-1], view.shape[:-1], device=device)
    weights = torch.randn(3, *labels.shape, device=device)
    run = differentiate(token_stats, view, labels, weights, impl="triton")
    check(run, view, labels, weights, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True])
def test_gradient_in_place_has_the_same_bits(device: str, dtype: torch.dtype, sliced: bool) -> None:
    torch.manual_seed(6)
    whole = random_logits(10, 131).view(2, 5, 131).to(device, dtype)
    labels = torch.randint(131, (2, 4) if sliced else (2, 5), device=device)
    labels[0, 0] = -100
    gradients = []
    for inplace in (False, True):
        leaf = whole.clone().requires_grad_()
        computed = leaf * 1
        logits = computed[:, :-1] if sliced else computed
        stats = token_stats(logits, labels, temperature=0.5, impl="triton", inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(list(stats), logits, [torch.full_like(labels, 0.3, dtype=torch.float32)] * 3)
        gradients.append(gradient)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
    assert torch.equal(*gradients)


def test_nothing_behind_the_rows_is_written(device: str) -> None:
    leaf = torch.randn(2, 5, 131, device=device, requires_grad=True)
    computed = leaf * 1
    logits = computed[:, :-1]
    labels = torch.zeros(2, 4, dtype=torch.long, device=device)
    stats = token_stats(logits, labels, impl="triton", inplace_backward=True)
    torch.autograd.grad(list(stats), logits, [torch.ones(2, 4, device=device)] * 3)
    assert torch.equal(computed[:, -1], leaf[:, -1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_several_labels_a_row(device: str, count: int, inplace: bool) -> None:
    """Repeats, ignored labels among others, and a row of ignored ones; 3 is no power of two."""
    torch.manual_seed(7)
    labels = torch.randint(70, (4, count))
    labels[0] = 5
    labels[1, -1] = -100
    labels[2] = -100
    values = random_logits(4, 70)
    weights = torch.randn(4, count)
    runs = []
    for logits, run in ((values, {"impl": "reference"}), (values.float().to(device), {"impl": "triton"})):
        logits = logits.detach().requires_grad_()
        inputs = logits * 1
        own = {"inplace_backward": inplace} if run["impl"] == "triton" else {}
        logprobs = token_logprobs(inputs, labels.to(logits.device), **run, **own)
        (gradient,) = torch.autograd.grad(logprobs, logits, weights.to(logprobs))
        runs.append((logprobs, gradient))
    assert error(runs[1][0], runs[0][0]) <= 2e-6
    assert error(runs[1][1], runs[0][1]) <= 2e-6


def test_too_many_labels_a_row_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="at most 1024 labels a row, not 1025"):
        token_logprobs(
            torch.zeros(1, 7, device=device), torch.zeros(1, 1025, dtype=torch.long, device=device), impl="triton"
        )


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(device: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, device=device)
    labels = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    run = differentiate(token_stats, logits, labels, torch.zeros(3, *shape[:-1]), impl="triton")
    assert all(s.shape == shape[:-1] for s in run.stats)
    assert run.gradient.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_is_around_it(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    logits = random_logits(9, 131).to(device, dtype)
    labels, weights = labels_of(logits), torch.randn(3, 9, device=device)
    whole = differentiate(token_stats, logits, labels, weights, impl="triton")
    for rows in (slice(0, 1), slice(3, 6), slice(8, 9)):
        part = differentiate(token_stats, logits[rows], labels[rows], weights[:, rows], impl="triton")
        for a, b in zip((*part.stats, part.gradient), (*whole.stats, whole.gradient), strict=True):
            assert torch.equal(a, b[rows])


def test_unused_outputs_cost_nothing_in_the_gradient(device: str) -> None:
    logits = torch.randn(2, 70, device=device, requires_grad=True)
    labels = torch.tensor([1, 2], device=device)
    entropy = token_stats(logits, labels, impl="triton").entropy
    exact = token_stats_reference(logits.double(), labels).entropy
    ours, expected = (torch.autograd.grad(e.sum(), logits)[0] for e in (entropy, exact))
    assert error(ours, expected) <= 2e-6


def test_second_derivative_is_refused(device: str) -> None:
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    logprob = token_stats(logits, torch.tensor([1, 2], device=device), impl="triton").logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_offsets_have_64_bits(device: str) -> None:
    """Strides of 32 bits, and a third row beyond them. Of 4 GiB of logits the rows alone are touched."""
    torch.manual_seed(9)
    logits = random_logits(3, 70).to(device, torch.bfloat16)
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device).as_strided((3, 70), (2**30 + 16, 1))
    far.copy_(logits)
    labels = torch.tensor([3, 69, 5], device=device)
    near = token_stats(logits, labels, impl="triton")
    with count_traffic(far) if device == "cpu" else contextlib.nullcontext():
        stats = token_stats(far, labels, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(stats, near, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_the_logits_once_and_writes_their_gradient_once(dtype: torch.dtype, small_blocks: None) -> None:
    """Beside the rows only each label's logit. The row that is ignored is not read."""
    bytes_ = dtype.itemsize
    logits = random_logits(4, 131).to(dtype).requires_grad_()
    labels = torch.tensor([5, -100, 0, 130])
    with count_traffic() as forward:
        stats = token_stats(logits, labels, impl="triton")
    assert forward.launches == 1
    assert forward.read(logits) == 3 * (131 + 1) * bytes_
    with count_traffic() as backward:
        (gradient,) = torch.autograd.grad(list(stats), logits, [torch.ones(4)] * 3)
    assert backward.launches == 1
    assert backward.read(logits) == 3 * (131 + 1) * bytes_
    assert backward.written(gradient) == 4 * 131 * bytes_


# What is broken, how, and the test that has to notice. The same tests pass above with the kernels as they are.
BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "the maximum starts at 0": (
        "token_stats",
        'lane_max = tl.full([LANES], float("-inf"), tl.float32)',
        "lane_max = tl.zeros([LANES], tl.float32)",
        lambda: test_matches_float64("cpu", torch.float32, 131, shifted_logits),
    ),
    "no mask on the last block": (
        "_rows",
        'tl.where(columns < end, logits, float("-inf"))',
        "logits",
        lambda: test_matches_float64("cpu", torch.float32, 131, random_logits),
    ),
    "no mask on the gradient's last block": (
        "token_stats",
        "value.to(gradient.dtype.element_ty), mask=within)",
        "value.to(gradient.dtype.element_ty))",
        lambda: test_nothing_behind_the_rows_is_written("cpu"),
    ),
    "an entropy without lse": (
        "_online_softmax",
        "online_softmax_log_sum(max, others) - LN_2 * weighted",
        "-LN_2 * weighted",
        lambda: test_matches_float64("cpu", torch.float32, 131, random_logits),
    ),
    "the argmax is in the sum": (
        "_online_softmax",
        "tl.sum(tl.where(is_top, 0.0, e), axis) + _ties(is_top, top, axis)",
        "tl.sum(e, axis) - 1.0",
        lambda: test_confident_token_keeps_its_digits("cpu", 40.0),
    ),
    "equal maxima count once": (
        "_online_softmax",
        "tl.sum(is_top.to(tl.int32), axis) - 1)",
        "tl.sum(is_top.to(tl.int32), axis) * 0)",
        lambda: test_matches_float64("cpu", torch.float32, 131, tied_logits),
    ),
    "an empty block is no special case": (
        "_online_softmax",
        "tl.where(max == _EMPTY, 0.0, max)",
        "max",
        lambda: test_matches_float64("cpu", torch.float32, 131, masked_logits),
    ),
    "0 times -inf": (
        "_online_softmax",
        "tl.maximum(shift, _NOTHING)",
        "shift",
        lambda: test_masked_token_has_probability_and_gradient_exactly_zero("cpu", torch.float32),
    ),
    "1 - p by subtraction": (
        "_online_softmax",
        "tl.where(w == 1.0, y, tl.where(near, corrected, w - 1.0))",
        "w - 1.0",
        lambda: test_confident_token_keeps_its_digits("cpu", 20.0),
    ),
    "a row at 32 bits": (
        "token_stats",
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)",
        lambda: test_offsets_have_64_bits("cpu"),
    ),
    "labels are not checked": (
        "token_stats",
        "outside = (label != ignore_index) & ((label < 0) | (label >= vocab))",
        "outside = label != label",
        lambda: test_label_outside_the_vocabulary_makes_its_row_nan_alone("cpu", -1),
    ),
    "an ignored row is read": (
        "token_stats",
        "end = tl.where(wanted, vocab, 0)",
        "end = vocab",
        lambda: test_reads_the_logits_once_and_writes_their_gradient_once(torch.float32, None),
    ),
    "one temperature for all": (
        "_rows",
        "tl.load(row_temperature + row)",
        "tl.load(row_temperature)",
        lambda: test_temperature_of_each_row_and_softcap("cpu", torch.float32, certain_logits),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str, small_blocks: None) -> None:
    assert_noticed(*BREAKS[what])
