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
from irlfast.ops import token_kl, token_kl_reference
from irlfast.ops._token_kl_cpu import backward_cpu, forward_cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["reverse", "forward", "js"]
CODES = _native.DIVERGENCES
# 1 and 7: shorter than a vector; 33: one block of AVX2 and AVX-512 and one more; 4093: ragged against every vector and
# block, and more than one move of the sums into double; 32768 and 50257: one piece whole, and two.
VOCABULARIES = [1, 7, 33, 4093, 32768, 50257]
ISAS = _native.build_info()["isas_usable"]

Pair = tuple[Tensor, Tensor]


def near_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    """A policy near its reference."""
    logits = torch.randn(rows, vocab, dtype=torch.float64) * 3
    return logits.to(dtype), (logits + 0.3 * torch.randn_like(logits)).to(dtype)


def unrelated_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    return tuple((torch.randn(rows, vocab, dtype=torch.float64) * 3).to(dtype) for _ in range(2))  # type: ignore[return-value]


def shifted_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    """By 150 up or down, the two of them apart."""
    logits, ref_logits = near_pair(rows, vocab, torch.float64)
    shift = torch.where(torch.arange(rows) % 2 == 0, 150.0, -150.0)[:, None]
    return (logits + shift).to(dtype), (ref_logits - shift).to(dtype)


def masked_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    """-inf at the same tokens of both: the first 1100, or scattered, or all but the last."""
    pair = near_pair(rows, vocab, dtype)
    for logits in pair:
        logits[0, : min(1100, vocab - 1)] = -math.inf
        logits[1::3, :-1:2] = -math.inf
        logits[2::3, :-1] = -math.inf
    return pair


def certain_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    """One token 25 nats above the rest in both."""
    pair = near_pair(rows, vocab, torch.float64)
    for logits in pair:
        logits.clamp_(-2, 2)
        logits[torch.arange(rows), torch.arange(rows) % vocab] = 27.0
    return pair[0].to(dtype), pair[1].to(dtype)


def rising_pair(rows: int, vocab: int, dtype: torch.dtype) -> Pair:
    """Every block raises one maximum or both."""
    up = torch.linspace(-20, 20, vocab, dtype=torch.float64).expand(rows, vocab)
    noise = torch.randn(rows, vocab, dtype=torch.float64) * 0.3
    other = torch.where(torch.arange(rows)[:, None] % 2 == 0, up.flip(-1) * 0.2, up)
    return (up + noise).to(dtype), other.to(dtype)


INPUTS = [near_pair, unrelated_pair, shifted_pair, masked_pair, certain_pair, rising_pair]


class Run(NamedTuple):
    kl: Tensor
    gradient: Tensor
    ref_gradient: Tensor


def differentiate(function: Callable[..., Tensor], pair: Pair, weights: Tensor, **kw: Any) -> Run:
    leaves = [x.detach().requires_grad_() for x in pair]
    kl = function(*leaves, **kw)
    return Run(kl.detach(), *torch.autograd.grad(kl, leaves, weights.to(kl.dtype)))


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities agree."""
    ours, exact = ours.double(), exact.double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = (ours - exact).abs().masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def assert_close_to_exact(ours: Run, pair: Pair, weights: Tensor, **kw: Any) -> None:
    """No worse than plain torch in the statistics' own precision, by more than a hair."""
    dtype = pair[0].dtype
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kw.items()}
    wide = dtype == torch.float64
    exact = differentiate(token_kl_reference, (pair[0].double(), pair[1].double()), weights, **double)
    eager = differentiate(token_kl_reference, pair if wide else (pair[0].float(), pair[1].float()), weights, **kw)
    # Near 10 float32's own spacing is 9.5e-7, of the result as of the softcapped logits that saturate there.
    tolerance = (1e-13 if wide else 2e-7) * (1 + float(exact.kl[exact.kl.isfinite()].max()))
    if kw.get("softcap") is not None:
        tolerance *= 4
    assert error(ours.kl, exact.kl) <= error(eager.kl, exact.kl) + tolerance
    for name in ("gradient", "ref_gradient"):
        bound = error(getattr(eager, name).to(dtype), getattr(exact, name)) + (1e-12 if wide else 2e-6)
        assert getattr(ours, name).dtype == dtype
        assert error(getattr(ours, name), getattr(exact, name)) <= bound, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, vocab: int, make: Callable[..., Pair], kind: str) -> None:
    torch.manual_seed(0)
    pair = make(3, vocab, dtype)
    weights = torch.randn(3)
    assert_close_to_exact(differentiate(token_kl, pair, weights, kind=kind, impl="cpu"), pair, weights, kind=kind)


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(
    isa: str, dtype: torch.dtype, make: Callable[..., Pair], kind: str, softcap: float | None
) -> None:
    torch.manual_seed(1)
    pair = make(6, 4093, dtype)
    weights = torch.randn(6)
    temperature = torch.rand(6) + 0.5
    wide = dtype == torch.float64
    options = (temperature.double() if wide else temperature, 1.0, softcap or 0.0, CODES[kind], 0.3)
    kl, state = forward_cpu(*pair, *options, isa=isa)
    gradients = backward_cpu(*pair, *options, state, weights.to(kl.dtype), True, True, isa=isa)
    kw = {"kind": kind, "temperature": temperature, "softcap": softcap, "js_weight": 0.3}
    assert_close_to_exact(Run(kl, *gradients), pair, weights, **kw)


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_the_published_bound(kind: str, dtype: torch.dtype, noise: float) -> None:
    """Logits of standard deviation 3 over a real vocabulary, a reference near the policy: within 2e-7 of float64."""
    torch.manual_seed(2)
    logits = torch.randn(64, 50257) * 3
    pair = logits.to(dtype), (logits + noise * torch.randn_like(logits)).to(dtype)
    exact = token_kl_reference(pair[0].double(), pair[1].double(), kind=kind)
    assert error(token_kl(*pair, kind=kind), exact) <= 2e-7


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_unrelated_models_is_a_tenth_of_eager(kind: str) -> None:
    """KL is near 9 there, where float32's own spacing is 9.5e-7."""
    torch.manual_seed(3)
    pair = unrelated_pair(64, 50257, torch.float32)
    exact = token_kl_reference(pair[0].double(), pair[1].double(), kind=kind)
    ours = error(token_kl(*pair, kind=kind), exact)
    assert ours <= 2e-6
    if kind != "js":
        assert ours <= 0.1 * error(token_kl_reference(*pair, kind=kind), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INPUTS)
def test_equal_rows_give_exactly_zero(make: Callable[..., Pair], dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(4)
    logits = make(4, 40_001, dtype)[0]
    assert torch.equal(token_kl(logits, logits.clone(), kind=kind).abs(), torch.zeros(4).to(token_kl(logits, logits)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_both(kind: str) -> None:
    torch.manual_seed(5)
    pair = [(torch.randn(2, 3, 37, dtype=torch.float64) * 2).requires_grad_() for _ in range(2)]
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5

    def op(a: Tensor, b: Tensor) -> Tensor:
        return token_kl(a, b, kind=kind, temperature=temperature, softcap=4.0, js_weight=0.3, impl="cpu")

    assert torch.autograd.gradcheck(op, pair)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    torch.manual_seed(6)
    pair = [torch.randn(4, 19, requires_grad=True) for _ in range(2)]
    options = (torch.rand(4) + 0.5, 1.0, 5.0, CODES[kind], 0.4)
    torch.library.opcheck(torch.ops.irlfast.token_kl.default, (*pair, *options, False))
    state = torch.ops.irlfast.token_kl(*pair, *options, False)[1].detach()
    plain = [x.detach() for x in pair]
    for wanted in ((True, False), (False, True), (True, True)):
        arguments = (*plain, *options, state, torch.randn(4), *wanted)
        torch.library.opcheck(torch.ops.irlfast.token_kl_backward.default, arguments)
    arguments = (*plain, *options, state, torch.randn(4), True)
    torch.library.opcheck(torch.ops.irlfast.token_kl_backward_.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch.manual_seed(7)
    torch.compiler.reset()

    def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return (
            token_kl(x * 2, y, temperature=t) - token_kl(x, y * 2, kind="forward") + token_kl(x, y, kind="js")
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        pair = [torch.randn(rows, 41, requires_grad=True) for _ in range(2)]
        temperature = torch.rand(rows) + 0.5
        value, expected = compiled(*pair, temperature), loss(*pair, temperature)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, pair), torch.autograd.grad(expected, pair))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [4093, 100_003])  # rows shared out over threads; pieces of rows shared out
def test_a_row_has_the_same_bits_whatever_is_around_it(
    vocab: int, dtype: torch.dtype, kind: str, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(8)
    pair = near_pair(21, vocab, dtype)
    weights = torch.randn(21)
    threads(1)
    whole = differentiate(token_kl, pair, weights, kind=kind)
    for count in (1, 3):
        threads(count)
        for rows in (slice(0, 21), slice(0, 1), slice(7, 10), slice(20, 21)):
            part = differentiate(token_kl, (pair[0][rows], pair[1][rows]), weights[rows], kind=kind)
            for name in Run._fields:
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), (name, count, rows)


def test_streamed_gradient_has_the_same_bits() -> None:
    """At 32 MiB the gradients are written past the caches, at addresses that need a vector's alignment."""
    torch.manual_seed(9)
    pair = near_pair(260, 33_001, torch.float32)
    weights = torch.randn(260)
    whole = differentiate(token_kl, pair, weights)
    half = differentiate(token_kl, (pair[0][:130], pair[1][:130]), weights[:130])
    assert whole.gradient.nbytes >= 32 << 20 > half.gradient.nbytes
    assert torch.equal(whole.gradient[:130], half.gradient)
    assert torch.equal(whole.ref_gradient[:130], half.ref_gradient)


def test_rows_beyond_two_to_the_31_elements() -> None:
    """Rows 2^30 apart in a storage of 4 GiB of bfloat16, of which only what is used is ever touched."""
    vocab, apart = 1000, 1 << 30
    far = torch.empty(2 * apart + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (apart, 1))
    torch.manual_seed(10)
    near, ref_logits = near_pair(3, vocab, torch.bfloat16)
    far.copy_(near)
    assert far.stride(0) * 2 >= 1 << 31
    weights = torch.randn(3)
    run = differentiate(token_kl, (far, ref_logits), weights)
    for ours, expected in zip(run, differentiate(token_kl, (near, ref_logits), weights), strict=True):
        assert torch.equal(ours, expected)


def test_more_than_two_to_the_31_elements() -> None:
    """One row of 2^16 tokens, expanded to 2^15 + 1 rows of the same memory."""
    torch.manual_seed(11)
    row, ref_row = near_pair(1, 1 << 16, torch.bfloat16)
    rows = (1 << 15) + 1
    assert rows * row.shape[1] > 1 << 31
    assert torch.equal(token_kl(row.expand(rows, -1), ref_row.expand(rows, -1)), token_kl(row, ref_row).expand(rows))


class TestInfinities:
    @pytest.mark.parametrize("impl", ["cpu", "reference"])
    @pytest.mark.parametrize("position", [0, 31, 4092])
    def test_a_token_the_reference_lacks(self, position: int, impl: str) -> None:
        torch.manual_seed(12)
        logits, ref_logits = near_pair(3, 4093, torch.float32)
        ref_logits[1, position] = -math.inf
        for kind, infinite in (("reverse", True), ("forward", False), ("js", False)):
            run = differentiate(token_kl, (logits, ref_logits), torch.ones(3), kind=kind, impl=impl)
            assert (run.kl == math.inf).tolist() == [False, infinite, False]
            assert run.gradient.isfinite().all()
            assert run.ref_gradient.isfinite().all()
            assert bool((run.gradient[1] == 0).all()) == infinite
            assert run.ref_gradient[1, position] == 0

    @pytest.mark.parametrize("impl", ["cpu", "reference"])
    def test_a_token_the_policy_lacks(self, impl: str) -> None:
        torch.manual_seed(13)
        logits, ref_logits = near_pair(2, 300, torch.float32)
        logits[1, :150] = -math.inf
        for kind, infinite in (("reverse", False), ("forward", True), ("js", False)):
            run = differentiate(token_kl, (logits, ref_logits), torch.ones(2), kind=kind, impl=impl)
            assert (run.kl == math.inf).tolist() == [False, infinite]
            assert run.gradient.isfinite().all()
            assert torch.equal(run.gradient[1, :150], torch.zeros(150))

    @pytest.mark.parametrize("isa", ISAS)
    def test_a_probability_that_underflows_is_not_zero(self, isa: str) -> None:
        """exp(-200) is 0 in float32, and the token is there all the same: 0 times infinity is no NaN."""
        logits = torch.tensor([[0.0, -200.0]])
        ref_logits = torch.tensor([[0.0, -math.inf]])
        kl, state = forward_cpu(logits, ref_logits, None, 1.0, 0.0, CODES["reverse"], 0.5, isa=isa)
        assert kl == math.inf
        gradient, _ = backward_cpu(
            logits, ref_logits, None, 1.0, 0.0, CODES["reverse"], 0.5, state, torch.ones(1), True, False, isa=isa
        )
        assert torch.equal(gradient, torch.zeros(1, 2))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("isa", ISAS)
    def test_the_lowest_float_masks_too(self, isa: str, kind: str) -> None:
        """Rows that begin with masks at -3.4e38: what was summed under that maximum goes out with it."""
        torch.manual_seed(14)
        logits, ref_logits = near_pair(2, 500, torch.float32)
        kept = logits[:, 200:], ref_logits[:, 200:]
        logits, ref_logits = logits.clone(), ref_logits.clone()
        logits[:, :200] = torch.finfo(torch.float32).min
        ref_logits[:, :200] = torch.finfo(torch.float32).min
        kl, _ = forward_cpu(logits, ref_logits, None, 1.0, 0.0, CODES[kind], 0.5, isa=isa)
        torch.testing.assert_close(kl, token_kl(*kept, kind=kind), rtol=0, atol=2e-7)

    @pytest.mark.parametrize("impl", ["cpu", "reference"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bad", [-math.inf, math.nan])
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("vocab", [5, 70_001])
    def test_row_without_a_distribution_is_nan_alone(
        self, vocab: int, side: int, bad: float, kind: str, impl: str
    ) -> None:
        torch.manual_seed(15)
        pair = near_pair(3, vocab, torch.float32)
        expected = token_kl(*pair, kind=kind, impl=impl)
        pair[side][1] = bad
        run = differentiate(token_kl, pair, torch.ones(3), kind=kind, impl=impl)
        assert run.kl[1].isnan()
        assert torch.equal(run.kl[::2], expected[::2])
        for gradient in (run.gradient, run.ref_gradient):
            assert gradient[1].isnan().any()
            assert gradient[::2].isfinite().all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize("position", [0, 40, 63, 4092])
    @pytest.mark.parametrize("isa", ISAS)
    def test_one_nan_logit_is_not_lost(self, isa: str, position: int, side: int, kind: str) -> None:
        torch.manual_seed(16)
        pair = near_pair(1, 4093, torch.float32)
        pair[side][0, position] = math.nan
        assert forward_cpu(*pair, None, 1.0, 0.0, CODES[kind], 0.5, isa=isa)[0].isnan()

    def test_zero_upstream_gives_zero_gradient_even_where_the_row_is_nan(self) -> None:
        pair = torch.full((2, 6), -math.inf), torch.zeros(2, 6)
        pair[0][1] = 0
        for kind in KINDS:
            run = differentiate(token_kl, pair, torch.tensor([0.0, 1.0]), kind=kind, impl="cpu")
            assert torch.equal(run.gradient, torch.zeros(2, 6))
            assert torch.equal(run.ref_gradient, torch.zeros(2, 6))


def _layouts() -> dict[str, Callable[[], Tensor]]:
    base = torch.Generator().manual_seed(17)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=base)

    return {
        "slice of positions": lambda: randn(3, 5, 70)[:, :-1],
        "slice of vocabulary": lambda: randn(3, 4, 100)[..., 13:83],
        "transposed rows": lambda: randn(4, 3, 70).transpose(0, 1),
        "three strides": lambda: randn(6, 4, 4, 70)[::2, :, ::4].squeeze(2),
        "expanded rows": lambda: randn(3, 1, 70).expand(3, 4, 70),
        "vocabulary not adjacent": lambda: randn(3, 70, 4).transpose(1, 2),
        "unaligned": lambda: randn(12 * 70 + 1)[1:].view(3, 4, 70),
    }


@pytest.mark.parametrize("ref_name", ["transposed rows", "vocabulary not adjacent", "unaligned"])
@pytest.mark.parametrize("name", list(_layouts()))
def test_layouts(name: str, ref_name: str) -> None:
    pair = _layouts()[name](), _layouts()[ref_name]()
    torch.manual_seed(18)
    weights = torch.randn(3, 4)
    strided = differentiate(token_kl, pair, weights, impl="cpu")
    packed = differentiate(token_kl, (pair[0].contiguous(), pair[1].contiguous()), weights, impl="cpu")
    for ours, expected in zip(strided, packed, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    kl = token_kl(logits, torch.zeros(shape), impl="cpu")
    assert kl.shape == shape[:-1]
    kl.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape


def test_one_row_without_dimensions() -> None:
    torch.manual_seed(19)
    logits, ref_logits = near_pair(1, 40, torch.float32)
    assert torch.equal(token_kl(logits[0], ref_logits[0]), token_kl(logits, ref_logits)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_asked_for(kind: str) -> None:
    torch.manual_seed(20)
    pair = near_pair(3, 50, torch.float32)
    both = differentiate(token_kl, pair, torch.ones(3), kind=kind)
    for side, expected in ((0, both.gradient), (1, both.ref_gradient)):
        leaves = [x.clone().requires_grad_(i == side) for i, x in enumerate(pair)]
        token_kl(*leaves, kind=kind).sum().backward()  # type: ignore[arg-type]
        assert torch.equal(leaves[side].grad, expected)  # type: ignore[arg-type]
        assert leaves[1 - side].grad is None


def test_temperature_as_tensor_equals_number() -> None:
    torch.manual_seed(21)
    pair = near_pair(6, 40, torch.float32)
    number = token_kl(*pair, temperature=0.5)
    for temperature in (torch.tensor(0.5), torch.full((6,), 0.5), torch.full((1,), 0.5, dtype=torch.float64)):
        assert torch.equal(token_kl(*pair, temperature=temperature), number)


logit_rows = st.integers(0, 2**31 - 1).map(lambda seed: _random_rows(seed))


def _random_rows(seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    vocab = int(torch.randint(2, 200, (1,), generator=generator))
    spread = float(torch.rand(1, generator=generator)) * 5
    logits = torch.randn(4, vocab, generator=generator, dtype=torch.float64) * spread
    return logits, logits + torch.randn(4, vocab, generator=generator, dtype=torch.float64)


class TestProperties:
    @settings(deadline=None, max_examples=50)
    @given(logit_rows)
    def test_reverse_and_forward_change_places(self, pair: Pair) -> None:
        logits, ref_logits = (x.float() for x in pair)
        assert torch.equal(token_kl(logits, ref_logits), token_kl(ref_logits, logits, kind="forward"))

    @settings(deadline=None, max_examples=50)
    @given(logit_rows, st.floats(0.05, 0.95))
    def test_jensen_shannon_is_symmetric_with_its_weight(self, pair: Pair, w: float) -> None:
        one, other = (
            token_kl(*pair, kind="js", js_weight=w),
            token_kl(*pair[::-1], kind="js", js_weight=1 - w),  # type: ignore[call-arg]
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        assert float(one.max()) <= -w * math.log(w) - (1 - w) * math.log1p(-w) + 1e-14

    @settings(deadline=None, max_examples=50)
    @given(logit_rows, st.floats(-100, 100), st.floats(-100, 100), st.sampled_from(KINDS))
    def test_shifts_of_the_logits_change_nothing(self, pair: Pair, a: float, b: float, kind: str) -> None:
        torch.testing.assert_close(
            token_kl(pair[0] + a, pair[1] + b, kind=kind),  # type: ignore[arg-type]
            token_kl(*pair, kind=kind),  # type: ignore[arg-type]
            rtol=0,
            atol=1e-11,
        )

    @settings(deadline=None, max_examples=50)
    @given(logit_rows, st.permutations(range(4)), st.sampled_from(KINDS))
    def test_rows_do_not_know_their_place(self, pair: Pair, order: list[int], kind: str) -> None:
        logits, ref_logits = (x.float() for x in pair)
        permuted = token_kl(logits[order], ref_logits[order], kind=kind)  # type: ignore[arg-type]
        assert torch.equal(permuted, token_kl(logits, ref_logits, kind=kind)[order])  # type: ignore[arg-type]

    @settings(deadline=None, max_examples=50)
    @given(logit_rows, st.sampled_from(KINDS), st.sampled_from([1e-4, 1e-2, 1.0]))
    def test_never_below_zero_by_more_than_rounding(self, pair: Pair, kind: str, nearness: float) -> None:
        logits = pair[0].float()
        ref_logits = logits + nearness * (pair[1] - pair[0]).float()
        assert float(token_kl(logits, ref_logits, kind=kind).min()) >= -1e-7  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature = 0.0 is not a positive finite number"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature of row 1 = -2.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"shape \(3,\) does not broadcast to the rows \(2,\)"),
        ({"softcap": -1.0}, ValueError, "softcap = -1.0"),
        ({"kind": "backward"}, ValueError, "kind='backward' is unknown; expected one of 'reverse', 'forward', 'js'"),
        ({"js_weight": 1.0}, ValueError, r"js_weight = 1.0 is not in \(0, 1\)"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "logits are torch.int32"),
        ({"logits": torch.zeros(2, 5).double()}, TypeError, "ref_logits are torch.float32, logits torch.float64"),
        ({"logits": torch.zeros(3, 5)}, ValueError, r"ref_logits have shape \(2, 5\), expected that of the logits"),
        ({"logits": torch.zeros(2, 0), "ref_logits": torch.zeros(2, 0)}, ValueError, "empty vocabulary"),
        ({"logits": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"ref_logits": torch.zeros(2, 5, device="meta")}, ValueError, "ref_logits are on meta, logits on cpu"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], exception: type[Exception], message: str, impl: str
) -> None:
    defaults: dict[str, Any] = {"logits": torch.zeros(2, 5), "ref_logits": torch.zeros(2, 5)}
    with pytest.raises(exception, match=message):
        token_kl(**{**defaults, **arguments}, impl=impl)


def test_unavailable_implementations_say_why() -> None:
    logits = torch.zeros(2, 5)
    for impl, reason in (
        ("cuda", "the kernel runs on GPUs of NVIDIA|built without CUDA kernels"),
        ("triton", "the tensor is on the CPU|not installed"),
    ):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available: .*({reason})"):
            token_kl(logits, logits, impl=impl)
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        token_kl(logits, logits, impl="fast")


def test_native_code_refuses_null_and_nonsense() -> None:
    layout = (1, 2, 0, 5)
    arguments: list[Any] = [0, 0, 0, layout, layout, 5, 0, 0.5, 1.0, 0, 0.0, 0, 0, 1, "auto"]
    with pytest.raises(ValueError, match="logits is a null pointer"):
        _native.token_kl_forward(*arguments)
    with pytest.raises(ValueError, match="kind 7 is unknown"):
        _native.token_kl_forward(*[*arguments[:6], 7, *arguments[7:]])
    with pytest.raises(ValueError, match="the reference has 3 rows, the logits 2"):
        _native.token_kl_forward(*[*arguments[:4], (1, 3, 0, 5), *arguments[5:]])


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_kl(logits, torch.zeros(2, 5)).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_traced_as_one_op() -> None:
    traced = make_fx(lambda x, y: token_kl(x, y))(torch.randn(2, 5), torch.randn(2, 5))
    assert torch.ops.irlfast.token_kl.default in [node.target for node in traced.graph.nodes]


def test_functional_transforms_take_the_reference() -> None:
    torch.manual_seed(22)
    pair = near_pair(3, 20, torch.float32)
    expected = differentiate(token_kl, pair, torch.ones(3)).gradient
    torch.testing.assert_close(torch.func.grad(lambda x: token_kl(x, pair[1]).sum())(pair[0]), expected)


class TestInplaceBackward:
    @pytest.mark.parametrize("ref_trained", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(6, 4093), (2, 3, 515), (1, 70_001)])
    def test_gradient_lands_in_the_logits(
        self, shape: tuple[int, ...], dtype: torch.dtype, kind: str, ref_trained: bool
    ) -> None:
        torch.manual_seed(23)
        values, ref_logits = (x.view(shape) for x in near_pair(math.prod(shape[:-1]), shape[-1], dtype))
        weights = torch.randn(shape[:-1])
        expected = differentiate(token_kl, (values, ref_logits), weights, kind=kind)
        logits = values.clone().requires_grad_() * 1
        ref_leaf = ref_logits.clone().requires_grad_(ref_trained)
        kl = token_kl(logits, ref_leaf, kind=kind, inplace_backward=True)
        wanted = [logits, ref_leaf] if ref_trained else [logits]
        gradients = torch.autograd.grad(kl, wanted, weights.to(kl.dtype))
        assert gradients[0].data_ptr() == logits.data_ptr()
        assert torch.equal(gradients[0], expected.gradient)
        if ref_trained:
            assert torch.equal(gradients[1], expected.ref_gradient)

    def test_second_backward_is_caught(self) -> None:
        logits = torch.randn(2, 5, requires_grad=True) * 1
        kl = token_kl(logits, torch.randn(2, 5), inplace_backward=True).sum()
        kl.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kl.backward()

    def test_impossible_requests_are_refused(self) -> None:
        ref_logits, leaf = torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)
        with pytest.raises(ValueError, match="inplace_backward on a leaf"):
            token_kl(leaf, ref_logits, inplace_backward=True)
        with pytest.raises(ValueError, match="scattered or overlap"):
            token_kl((leaf * 1)[:1].expand(2, 5), ref_logits, inplace_backward=True)
        both = leaf.repeat(2, 1)
        with pytest.raises(ValueError, match="share memory with ref_logits"):
            token_kl(both[:2], both[2:], inplace_backward=True)
        with pytest.raises(RuntimeError, match="needs a fused kernel"):
            token_kl(leaf * 1, ref_logits, inplace_backward=True, impl="reference")
