from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast import _native
from irlfast.ops import (
    PolicyRefStats,
    _linear_plan,
    linear_policy_ref_stats,
    linear_policy_ref_stats_reference,
    linear_token_stats,
    token_kl,
)
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_pair_cpu import CpuPairEpilogue

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = _native.build_info()["isas_usable"]
# 7: below a vector; 2047, 2048, 2049: around a piece; 5003: three pieces, the last ragged.
VOCABULARIES = [7, 2047, 2048, 2049, 5003]
DIFFERENTIABLE = ("logprob", "entropy", "lse", "reverse_kl", "forward_kl")


class Inputs:
    """A policy and a reference near it, of another width; row 1 ignored."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, depth: int = 16, ref_depth: int = 12) -> None:
        wide = torch.float64
        scale = 3 / math.sqrt(depth)
        hidden, weight = torch.randn(rows, depth, dtype=wide), torch.randn(vocab, depth, dtype=wide) * scale
        mix = torch.randn(depth, ref_depth, dtype=wide) / math.sqrt(ref_depth)
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.bias = torch.randn(vocab, dtype=wide).to(dtype)
        self.ref_hidden = (hidden @ mix).to(dtype)
        self.ref_weight = (weight @ mix).to(dtype)
        self.ref_bias = torch.randn(vocab, dtype=wide).to(dtype)
        self.labels = torch.randint(vocab, (rows,))
        if rows > 1:
            self.labels[1] = -100

    def run(
        self,
        function: Callable[..., PolicyRefStats],
        upstream: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        **kw: Any,
    ) -> tuple[PolicyRefStats, list[Tensor]]:
        """Statistics, and the gradients of hidden, weight and bias for these upstream gradients."""
        to = dtype or self.hidden.dtype
        leaves = [t.detach().to(to).requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        stats = function(
            leaves[0],
            leaves[1],
            self.ref_hidden.to(to),
            self.ref_weight.to(to),
            self.labels,
            bias=leaves[2],
            ref_bias=self.ref_bias.to(to),
            **kw,
        )
        outputs = [getattr(stats, name) for name in upstream]
        grads = [g.to(o.dtype) for g, o in zip(upstream.values(), outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves, grads)
        return PolicyRefStats(*(s.detach() for s in stats)), list(gradients)


def upstream_for(rows: int, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    return {name: torch.randn(rows) for name in names}


def assert_close(ours: tuple[PolicyRefStats, list[Tensor]], exact: tuple[PolicyRefStats, list[Tensor]]) -> None:
    dtype = ours[1][0].dtype
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}[dtype]
    for name in PolicyRefStats._fields:
        a, b = getattr(ours[0], name), getattr(exact[0], name)
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=name)
    # The logits' gradient is rounded to bfloat16 before the products where the processor multiplies that.
    rounding = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for a, b in zip(ours[1], exact[1], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=rounding * float(b.abs().max()) + tolerance)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}, {"per_row": True}], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, vocab: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = Inputs(9, vocab, dtype)
    upstream = upstream_for(9)
    options = {"temperature": torch.rand(9, dtype=torch.float64) + 0.5} if options.get("per_row") else options
    exact = inputs.run(linear_policy_ref_stats_reference, upstream, torch.float64, **options)
    assert_close(inputs.run(linear_policy_ref_stats, upstream, impl="cpu", **options), exact)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_gradient_alone(name: str) -> None:
    """Without a divergence's gradient the reference's logits are not made again."""
    torch.manual_seed(1)
    inputs = Inputs(6, 2100, torch.float64)
    upstream = upstream_for(6, (name,))
    exact = inputs.run(linear_policy_ref_stats_reference, upstream)
    assert_close(inputs.run(linear_policy_ref_stats, upstream), exact)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """The epilogue on given logits, in two chunks, against autograd."""
    if out_dtype is not None and dtype == torch.float64:
        return
    torch.manual_seed(2)
    rows, vocab, cut = 5, 3001, 2048
    logits = (torch.randn(rows, vocab, dtype=torch.float64) * 3).to(dtype)
    ref_logits = (logits + torch.randn(rows, vocab, dtype=dtype)).contiguous()
    labels = torch.tensor([0, 2047, 2048, 3000, 17])
    upstream = Upstream(*(torch.randn(rows, dtype=dtype) for _ in range(5)))
    of_rows = Rows(labels, torch.rand(rows, dtype=dtype) + 0.5, 1.0, 6.0)
    epilogue = CpuPairEpilogue(isa)
    running = torch.zeros(9, rows, dtype=torch.float64)
    running[0] = running[4] = -math.inf
    for columns in (slice(0, cut), slice(cut, vocab)):
        epilogue.merge(logits[:, columns], ref_logits[:, columns], columns.start, of_rows, running)
    gradient = torch.empty(rows, vocab, dtype=out_dtype or dtype)
    for columns in (slice(0, cut), slice(cut, vocab)):
        arguments = (logits[:, columns], ref_logits[:, columns], columns.start, of_rows, running, upstream)
        epilogue.differentiate(*arguments, gradient[:, columns])

    leaf = logits.double().requires_grad_()
    identity = torch.eye(vocab, dtype=torch.float64)
    assert of_rows.row_temperature is not None
    exact = linear_policy_ref_stats_reference(
        leaf, identity, ref_logits.double(), identity, labels, temperature=of_rows.row_temperature.double(), softcap=6.0
    )
    outputs = [getattr(exact, name) for name in DIFFERENTIABLE]
    (expected,) = torch.autograd.grad(outputs, leaf, [g.double() for g in upstream if g is not None])
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    rounding = 0.0 if out_dtype is None else 2.0**-8
    torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=tolerance)


def test_agrees_with_the_other_ops() -> None:
    torch.manual_seed(3)
    inputs = Inputs(12, 4099, torch.float64)
    stats, _ = inputs.run(linear_policy_ref_stats, upstream_for(12))
    alone = linear_token_stats(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias)
    reference = linear_token_stats(inputs.ref_hidden, inputs.ref_weight, inputs.labels, bias=inputs.ref_bias)
    for ours, expected in zip(stats, (*alone, reference.logprob), strict=False):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    ref_logits = torch.nn.functional.linear(inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias)
    labelled = inputs.labels != -100
    for ours, kind in ((stats.reverse_kl, "reverse"), (stats.forward_kl, "forward")):
        expected = token_kl(logits, ref_logits, kind=kind) * labelled  # type: ignore[arg-type]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_gradcheck() -> None:
    torch.manual_seed(4)
    inputs = Inputs(4, 23, torch.float64, depth=5, ref_depth=3)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        stats = linear_policy_ref_stats(
            hidden,
            weight,
            inputs.ref_hidden,
            inputs.ref_weight,
            inputs.labels,
            bias=bias,
            ref_bias=inputs.ref_bias,
            temperature=0.8,
            softcap=4.0,
            impl="cpu",
        )
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(op, leaves)


def test_opcheck() -> None:
    torch.manual_seed(5)
    inputs = Inputs(4, 19, torch.float32)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
    fixed = (inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, inputs.labels, torch.rand(4) + 0.5)
    options = (1.0, 5.0, -100, 2048)
    torch.library.opcheck(torch.ops.irlfast.linear_policy_ref_stats.default, (*leaves, *fixed, *options))
    plain = [t.detach() for t in leaves]
    running = torch.ops.irlfast.linear_policy_ref_stats(*plain, *fixed, *options)[6]
    for needs in ([True, True, True], [True, False, False]):
        arguments = (*plain, *fixed, *options, running, torch.randn(4), None, None, torch.randn(4), None, needs)
        torch.library.opcheck(torch.ops.irlfast.linear_policy_ref_stats_backward.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_compiles_to_one_graph() -> None:
    torch.manual_seed(6)
    torch.compiler.reset()
    inputs = Inputs(5, 41, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_policy_ref_stats(hidden * 2, weight, inputs.ref_hidden, inputs.ref_weight, inputs.labels)
        return (stats.logprob - 0.1 * stats.reverse_kl + stats.forward_kl + stats.ref_logprob).sum()

    leaves = [inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True)
    value, expected = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_chunks_and_threads_leave_the_same_bits(isa: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Of the sums over given logits; a product's own bits may depend on its shape."""
    torch.manual_seed(7)
    rows, vocab = 9, 9001
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    ref_logits = logits + torch.randn(rows, vocab, dtype=dtype)
    of_rows = Rows(torch.randint(vocab, (rows,)), None, 0.9, 0.0)
    results = []
    for chunk, count in ((2048, 1), (4096, 3), (10240, 1), (10240, 3)):
        threads(count)
        running = torch.zeros(9, rows, dtype=torch.float64)
        running[0] = running[4] = -math.inf
        for begin in range(0, vocab, chunk):
            part, ref_part = logits[:, begin : begin + chunk], ref_logits[:, begin : begin + chunk]
            CpuPairEpilogue(isa).merge(part, ref_part, begin, of_rows, running)
        results.append(running)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_of_rows_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at a time as fit the scratch memory; here 3 of 10."""
    torch.manual_seed(8)
    inputs = Inputs(10, 2500, dtype)
    upstream = upstream_for(10)
    whole = inputs.run(linear_policy_ref_stats, upstream)
    monkeypatch.setattr(_linear_plan, "SCRATCH_BYTES", 3 * 2048 * (8 if dtype == torch.float64 else 4))
    parts = inputs.run(linear_policy_ref_stats, upstream)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    for ours, expected in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16), vocab=st.integers(1, 5000), shift=st.floats(-150, 150), ref_shift=st.floats(-150, 150)
)
def test_shifts_through_the_biases_move_lse_alone(seed: int, vocab: int, shift: float, ref_shift: float) -> None:
    torch.manual_seed(seed)
    inputs, upstream = Inputs(5, vocab, torch.float64), upstream_for(5)
    plain, gradients = inputs.run(linear_policy_ref_stats, upstream)
    inputs.bias, inputs.ref_bias = inputs.bias + shift, inputs.ref_bias + ref_shift
    moved, moved_gradients = inputs.run(linear_policy_ref_stats, upstream)
    labelled = (inputs.labels != -100).double()
    for name in PolicyRefStats._fields:
        expected = getattr(plain, name) + (shift * labelled if name == "lse" else 0.0)
        torch.testing.assert_close(getattr(moved, name), expected, **CLOSE, msg=name)
    for one, other in zip(gradients, moved_gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 5000), ranks=st.integers(1, 4), contiguous=st.booleans())
def test_pieces_of_the_batch_add_up(seed: int, vocab: int, ranks: int, contiguous: bool) -> None:
    """Gradient accumulation over consecutive pieces, and rows dealt out over ranks, in any order."""
    torch.manual_seed(seed)
    inputs, upstream = Inputs(11, vocab, torch.float64), upstream_for(11)
    whole, gradients = inputs.run(linear_policy_ref_stats, upstream)
    shares = torch.arange(11).tensor_split(ranks) if contiguous else [torch.arange(r, 11, ranks) for r in range(ranks)]
    hidden, ref_hidden, labels = inputs.hidden, inputs.ref_hidden, inputs.labels
    totals = [torch.zeros_like(gradient) for gradient in gradients]
    for share in shares:
        inputs.hidden, inputs.ref_hidden, inputs.labels = hidden[share], ref_hidden[share], labels[share]
        part, (of_hidden, *shared) = inputs.run(linear_policy_ref_stats, {k: v[share] for k, v in upstream.items()})
        for name in PolicyRefStats._fields:
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[share], **CLOSE, msg=name)
        totals[0][share] = of_hidden
        for total, gradient in zip(totals[1:], shared, strict=True):
            total += gradient
    for total, gradient in zip(totals, gradients, strict=True):
        torch.testing.assert_close(total, gradient, **CLOSE)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 9000), pieces=st.integers(1, 5))
def test_chunk_does_not_matter(seed: int, vocab: int, pieces: int) -> None:
    torch.manual_seed(seed)
    inputs, upstream = Inputs(6, vocab, torch.float32), upstream_for(6)
    piece = _native.CHUNK_PIECE
    (one, gradients), (other, others) = (
        inputs.run(linear_policy_ref_stats, upstream, chunk=chunk) for chunk in (piece, pieces * piece)
    )
    for name in PolicyRefStats._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-6, msg=name)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_more_than_2_to_the_31_logits() -> None:
    """Of which no more than a chunk exists at a time."""
    torch.manual_seed(3)
    vocab = 50_257
    inputs = Inputs(2**31 // vocab + 3, vocab, torch.float32, depth=4, ref_depth=3)
    upstream = upstream_for(len(inputs.hidden))
    ends = torch.tensor([0, len(inputs.hidden) // 2, len(inputs.hidden) - 1])
    upstream = {name: torch.zeros_like(v).index_copy(0, ends, v[ends]) for name, v in upstream.items()}
    stats, gradients = inputs.run(linear_policy_ref_stats, upstream)
    inputs.hidden, inputs.ref_hidden, inputs.labels = (
        x[ends] for x in (inputs.hidden, inputs.ref_hidden, inputs.labels)
    )
    few = {name: v[ends] for name, v in upstream.items()}
    exact = inputs.run(linear_policy_ref_stats_reference, few, torch.float64)
    assert int(gradients[0].abs().sum(1).count_nonzero()) == len(ends)
    picked = PolicyRefStats(*(statistic[ends] for statistic in stats))
    assert_close((picked, [gradients[0][ends], *gradients[1:]]), exact)


def test_equal_models_do_not_diverge() -> None:
    torch.manual_seed(9)
    inputs = Inputs(6, 5003, torch.float32)
    labels = inputs.labels.clamp(min=0)
    stats = linear_policy_ref_stats(inputs.hidden, inputs.weight, inputs.hidden, inputs.weight, labels)
    assert torch.equal(stats.reverse_kl, torch.zeros(6))
    assert torch.equal(stats.forward_kl, torch.zeros(6))
    assert torch.equal(stats.logprob, stats.ref_logprob)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_ignored_rows_and_rows_without_gradient_get_exactly_zero(impl: str) -> None:
    torch.manual_seed(10)
    inputs = Inputs(6, 60, torch.float32)
    inputs.hidden[1] = math.nan
    inputs.ref_hidden[1] = math.nan
    inputs.hidden[3] = math.nan
    upstream = {name: g.index_fill(0, torch.tensor(3), 0.0) for name, g in upstream_for(6).items()}
    stats, (of_hidden, *others) = inputs.run(linear_policy_ref_stats, upstream, impl=impl)
    for statistic in stats:
        assert statistic[1] == 0
    assert torch.equal(of_hidden[1], torch.zeros(16))
    if impl == "cpu":  # eager's products meet the NaN of row 3
        assert torch.equal(of_hidden[3], torch.zeros(16))
        assert all(g.isfinite().all() for g in others)
    assert (of_hidden[[0, 2, 4, 5]] != 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_token_only_the_policy_has(impl: str) -> None:
    """The reverse divergence is infinite and passes no gradient; the other statistics pass theirs."""
    torch.manual_seed(11)
    inputs = Inputs(4, 3000, torch.float64)
    inputs.ref_bias[2500] = -math.inf
    upstream = upstream_for(4)
    stats, gradients = inputs.run(linear_policy_ref_stats, upstream, impl=impl)
    assert (stats.reverse_kl[[0, 2, 3]] == math.inf).all()
    assert stats.forward_kl.isfinite().all()
    upstream["reverse_kl"] = torch.zeros(4)
    inputs.ref_bias[2500] = -1e4  # as good as -inf, and finite
    _, expected = inputs.run(linear_policy_ref_stats_reference, upstream)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def test_the_reference_receives_nothing() -> None:
    torch.manual_seed(12)
    inputs = Inputs(4, 50, torch.float32)
    for t in (inputs.hidden, inputs.ref_hidden, inputs.ref_weight):
        t.requires_grad_()
    for impl in ("cpu", "reference"):
        stats = linear_policy_ref_stats(
            inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight, inputs.labels, impl=impl
        )
        assert not stats.ref_logprob.requires_grad
        (stats.reverse_kl + stats.forward_kl).sum().backward()
    assert inputs.hidden.grad is not None
    assert inputs.ref_hidden.grad is None
    assert inputs.ref_weight.grad is None


def test_a_reference_in_another_type() -> None:
    torch.manual_seed(13)
    inputs = Inputs(5, 300, torch.float32)
    narrow = inputs.ref_hidden.bfloat16(), inputs.ref_weight.bfloat16()
    stats = linear_policy_ref_stats(inputs.hidden, inputs.weight, *narrow, inputs.labels)
    wide = (t.float() for t in narrow)
    expected = linear_policy_ref_stats(inputs.hidden, inputs.weight, *wide, inputs.labels)
    torch.testing.assert_close(tuple(stats), tuple(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(14)
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight, ref_weight = torch.randn(30, 8), torch.randn(30, 4)
    labels = torch.randint(30, shape)
    stats = linear_policy_ref_stats(hidden, weight, torch.randn(*shape, 4), ref_weight, labels)
    assert all(s.shape == shape for s in stats)
    stats.reverse_kl.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"ref_weight": torch.zeros(6, 4)}, ValueError, "ref_weight has 6 tokens, weight 5"),
        ({"ref_hidden": torch.zeros(3, 4)}, ValueError, r"of the reference: labels have shape \(2,\)"),
        ({"ref_hidden": torch.zeros(2, 3)}, ValueError, r"of the reference: weight has shape \(5, 4\)"),
        ({"ref_hidden": torch.zeros(2, 4).double()}, TypeError, "of the reference: weight is torch.float32"),
        (
            {"ref_hidden": torch.zeros(2, 4).double(), "ref_weight": torch.zeros(5, 4).double()},
            TypeError,
            "ref_hidden is torch.float64, hidden torch.float32; only both",
        ),
        ({"labels": torch.tensor([1, 5])}, IndexError, r"labels\[1\] = 5 is outside \[0, 5\)"),
        ({"temperature": -1.0}, ValueError, "temperature = -1.0 is not a positive finite number"),
        ({"chunk": 0}, ValueError, "chunk = 0"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], exception: type[Exception], message: str, impl: str
) -> None:
    defaults: dict[str, Any] = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "ref_hidden": torch.zeros(2, 4),
        "ref_weight": torch.zeros(5, 4),
        "labels": torch.tensor([0, 4]),
    }
    with pytest.raises(exception, match=message):
        linear_policy_ref_stats(**{**defaults, **arguments}, impl=impl)


def test_second_derivative_is_refused() -> None:
    inputs = Inputs(3, 20, torch.float32)
    hidden = inputs.hidden.requires_grad_()
    stats = linear_policy_ref_stats(hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight, inputs.labels)
    (gradient,) = torch.autograd.grad(stats.reverse_kl.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_native_code_refuses_nonsense() -> None:
    arguments: list[Any] = [0, 5, 0, 5, 0, 2, 0, 5, 0, 1.0, 0, 0.0, 0, 2, 1, "auto"]
    with pytest.raises(ValueError, match="logits is a null pointer"):
        _native.linear_policy_ref_stats_merge(*arguments)
    with pytest.raises(ValueError, match="first_column = 100 is no multiple of 2048"):
        _native.linear_policy_ref_stats_merge(*[*arguments[:6], 100, *arguments[7:]])
