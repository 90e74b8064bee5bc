"""The Triton token_kl, through the public op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import (
    BIG,
    PAIRS,
    error,
    masked_pair,
    near_pair,
    partly_masked_pair,
    rising_pair,
    rounding,
    shifted_pair,
    unrelated_pair,
)
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import token_kl, token_kl_reference

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["reverse", "forward", "js"]

Pair = tuple[Tensor, Tensor]


class Run(NamedTuple):
    kl: Tensor
    gradient: Tensor
    ref_gradient: Tensor


def differentiate(function: Callable[..., Tensor], pair: Pair, weights: Tensor, **kw: Any) -> Run:
    leaves = [x.detach().requires_grad_() for x in pair]
    kl = function(*leaves, **kw)
    return Run(kl.detach(), *torch.autograd.grad(kl, leaves, weights.to(kl)))


def check(ours: Run, pair: Pair, weights: Tensor, device: str, **kw: Any) -> None:
    """No worse than plain torch in float32, by more than a hair; the gradients, rounded to the logits' dtype."""
    dtype = pair[0].dtype
    pair, weights = (pair[0].cpu(), pair[1].cpu()), weights.cpu()
    kw = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kw.items()}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in kw.items()}
    exact = differentiate(token_kl_reference, (pair[0].double(), pair[1].double()), weights, **wide)
    eager = differentiate(token_kl_reference, (pair[0].float(), pair[1].float()), weights, **kw)
    assert ours.kl.dtype == torch.float32
    assert error(ours.kl, exact.kl) <= error(eager.kl, exact.kl) + 1e-5
    # An infinite divergence passes no gradient, which the reference does not know.
    passes = exact.kl.isfinite()
    for name in ("gradient", "ref_gradient"):
        assert getattr(ours, name).dtype == dtype
        mine, theirs, right = (getattr(run, name).cpu() for run in (ours, eager, exact))
        assert bool((mine[~passes] == 0).all())
        bound = error(theirs[passes], right[passes]) + 2e-6
        assert error(mine[passes], right[passes], rounding(dtype, device)) <= bound, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("vocab", [7, 131])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device: str, dtype: torch.dtype, vocab: int, make: Callable[..., Pair], kind: str) -> None:
    torch.manual_seed(0)
    a, b = make(4, vocab)
    pair, weights = (a.to(device, dtype), b.to(device, dtype)), torch.randn(4, device=device)
    check(differentiate(token_kl, pair, weights, kind=kind, impl="triton"), pair, weights, device, kind=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("vocab", BIG)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_matches_float64_in_real_sizes(dtype: torch.dtype, vocab: int, make: Callable[..., Pair], kind: str) -> None:
    test_matches_float64("cuda", dtype, vocab, make, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [near_pair, unrelated_pair])
def test_temperature_of_each_row_softcap_and_weight(device: str, make: Callable[..., Pair], kind: str) -> None:
    torch.manual_seed(1)
    a, b = make(4, 131)
    pair, weights = (a.float().to(device), b.float().to(device)), torch.randn(4, device=device)
    options = {"kind": kind, "temperature": torch.rand(4, device=device) + 0.5, "softcap": 10.0, "js_weight": 0.3}
    check(differentiate(token_kl, pair, weights, impl="triton", **options), pair, weights, device, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", PAIRS)
def test_equal_rows_give_exactly_zero(device: str, make: Callable[..., Pair], kind: str) -> None:
    torch.manual_seed(2)
    logits = make(4, 131)[0].float().to(device)
    assert torch.equal(token_kl(logits, logits.clone(), kind=kind, impl="triton"), torch.zeros(4, device=device))


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_row_without_a_distribution_is_nan_alone(device: str, kind: str, side: int, bad: float) -> None:
    torch.manual_seed(3)
    pair = tuple(x.float().to(device) for x in near_pair(3, 70))
    pair[side][1] = bad
    run = differentiate(token_kl, pair, torch.ones(3, device=device), kind=kind, impl="triton")
    for result in run:
        assert bool(result[1].isnan().all())
        assert bool(result[[0, 2]].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 31, 69])
def test_one_nan_logit_is_not_lost(device: str, position: int, kind: str) -> None:
    for side in (0, 1):
        pair = [torch.zeros(1, 70, device=device), torch.zeros(1, 70, device=device)]
        pair[side][0, position] = math.nan
        assert bool(token_kl(*pair, kind=kind, impl="triton").isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_upstream_gives_zero_gradients_even_where_the_row_is_nan(device: str, kind: str) -> None:
    pair = (torch.full((2, 70), math.nan, device=device), torch.zeros(2, 70, device=device))
    run = differentiate(token_kl, pair, torch.zeros(2, device=device), kind=kind, impl="triton")
    assert torch.equal(run.gradient, torch.zeros(2, 70, device=device))
    assert torch.equal(run.ref_gradient, torch.zeros(2, 70, device=device))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["sequence slice", "vocabulary slice", "one row for all", "transposed"])
def test_layouts(device: str, layout: str, kind: str) -> None:
    """The two sides laid out differently."""
    torch.manual_seed(4)
    a, b = (x.view(2, 4, 80).float().to(device) for x in near_pair(8, 80))
    pair = {
        "sequence slice": lambda: (a[:, :-1], b[:, 1:].contiguous()),
        "vocabulary slice": lambda: (a[..., 3:74].contiguous(), b[..., 3:74]),
        "one row for all": lambda: (a, b[:1, :1].expand(2, 4, 80)),
        "transposed": lambda: (a.transpose(1, 2), b.transpose(1, 2).contiguous()),
    }[layout]()
    weights = torch.randn(pair[0].shape[:-1], device=device)
    check(differentiate(token_kl, pair, weights, kind=kind, impl="triton"), pair, weights, device, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_place_has_the_same_bits(device: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    a, b = (x.to(device, dtype) for x in near_pair(4, 131))
    results = []
    for inplace in (False, True):
        leaf, ref = a.clone().requires_grad_(), b.clone().requires_grad_()
        logits = leaf * 1
        kl = token_kl(logits, ref, kind=kind, temperature=0.5, impl="triton", inplace_backward=inplace)
        gradients = torch.autograd.grad(kl.sum(), (logits, ref))
        assert (gradients[0].data_ptr() == logits.data_ptr()) == inplace
        results.append(gradients)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_side_alone(device: str, kind: str) -> None:
    torch.manual_seed(6)
    pair = tuple(x.float().to(device) for x in near_pair(3, 70))
    both = differentiate(token_kl, pair, torch.ones(3, device=device), kind=kind, impl="triton")
    for side, expected in enumerate((both.gradient, both.ref_gradient)):
        leaf = pair[side].clone().requires_grad_()
        sides = [leaf, pair[1]] if side == 0 else [pair[0], leaf]
        (gradient,) = torch.autograd.grad(token_kl(*sides, kind=kind, impl="triton").sum(), leaf)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_whatever_is_around_it(device: str, kind: str) -> None:
    torch.manual_seed(7)
    a, b = (x.float().to(device) for x in near_pair(9, 131))
    weights = torch.randn(9, device=device)
    whole = differentiate(token_kl, (a, b), weights, kind=kind, impl="triton")
    for rows in (slice(0, 1), slice(3, 6), slice(8, 9)):
        part = differentiate(token_kl, (a[rows], b[rows]), weights[rows], kind=kind, impl="triton")
        assert all(torch.equal(x, y[rows]) for x, y in zip(part, whole, strict=True))


def test_no_rows(device: str) -> None:
    pair = (torch.zeros(2, 0, 7, device=device), torch.zeros(2, 0, 7, device=device))
    run = differentiate(token_kl, pair, torch.zeros(2, 0, device=device), impl="triton")
    assert run.kl.shape == (2, 0)
    assert run.gradient.shape == run.ref_gradient.shape == (2, 0, 7)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_reads_each_row_once_and_writes_each_gradient_once(kind: str, small_blocks: None) -> None:
    """Jensen-Shannon, whose mixture needs both normalisers, reads each twice in the forward pass."""
    pair = [x.to(torch.bfloat16).requires_grad_() for x in near_pair(3, 131)]
    row = 131 * 2
    with count_traffic() as forward:
        kl = token_kl(*pair, kind=kind, impl="triton")
    assert forward.launches == 1
    assert [forward.read(x) for x in pair] == [3 * row * (2 if kind == "js" else 1)] * 2
    with count_traffic() as backward:
        gradients = torch.autograd.grad(kl, pair, torch.tensor([1.0, 0.0, 1.0]))
    assert backward.launches == 1
    assert [backward.read(x) for x in pair] == [2 * row] * 2
    assert [backward.written(x) for x in gradients] == [3 * row] * 2


# What is broken, how, and the test that has to notice.
BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "a maximum starts at 0": (
        "token_kl",
        'q_max = tl.full([LANES], float("-inf"), tl.float32)',
        "q_max = tl.zeros([LANES], tl.float32)",
        lambda: test_matches_float64("cpu", torch.float32, 131, shifted_pair, "reverse"),
    ),
    "no mask on the last block": (
        "_rows",
        'tl.where(columns < end, logits, float("-inf"))',
        "logits",
        lambda: test_matches_float64("cpu", torch.float32, 131, near_pair, "forward"),
    ),
    "the sum is not moved when maxima rise": (
        "_online_divergence",
        "(p_over_q + drift * (1.0 + p_others))",
        "p_over_q",
        lambda: test_matches_float64("cpu", torch.float32, 131, rising_pair, "reverse"),
    ),
    "infinite differences": (
        "_online_divergence",
        "tl.where(difference > -_HUGE, difference, -_HUGE)",
        "difference",
        lambda: test_matches_float64("cpu", torch.float32, 131, masked_pair, "reverse"),
    ),
    "an infinite divergence has a gradient": (
        "token_kl",
        'zero |= tl.abs(of_p) == float("inf")',
        "zero |= False",
        lambda: test_matches_float64("cpu", torch.float32, 131, partly_masked_pair, "reverse"),
    ),
    "no log of the normalisers": (
        "_online_divergence",
        "temperature) - log_ratio",
        "temperature)",
        lambda: test_matches_float64("cpu", torch.float32, 131, unrelated_pair, "reverse"),
    ),
    "weights of the mixture exchanged": (
        "_online_divergence",
        "weight * p + (1.0 - weight) * q",
        "weight * q + (1.0 - weight) * p",
        lambda: test_temperature_of_each_row_softcap_and_weight("cpu", near_pair, "js"),
    ),
    "the gradient without the divergence": (
        "token_kl",
        "by_logit * (log_ratio + of_p)",
        "by_logit * log_ratio",
        lambda: test_matches_float64("cpu", torch.float32, 131, unrelated_pair, "forward"),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str, small_blocks: None) -> None:
    assert_noticed(*BREAKS[what])
