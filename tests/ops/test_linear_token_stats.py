"""ops.linear_token_stats: every mode against float64, exactness over chunks and threads, sparsity, memory, errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast import _native
from irlfast.ops import (
    TokenStats,
    _linear_plan,
    linear_token_stats,
    linear_token_stats_reference,
    token_stats,
    token_stats_reference,
)
from irlfast.ops import _linear as chunked
from irlfast.ops._linear import Epilogue, Head, Rows, Upstream, finish, sweep
from irlfast.ops._linear_cpu import CpuEpilogue
from irlfast.ops._linear_plan import Sizes, plan_forward
from irlfast.ops.linear_token_stats import resolve_mode

ROOT = Path(__file__).parents[2]
ISAS = _native.build_info()["isas_usable"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = ["recompute", "keep", "frozen"]
PIECE = _native.CHUNK_PIECE
# Within, at and past one piece of 2048 columns, and two of them; 5003 ends in a ragged third chunk.
VOCABULARIES = [1, 5, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 5003]


class Problem(NamedTuple):
    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)
    labels: Tensor  # (...)

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Problem(self.hidden.to(dtype), self.weight.to(dtype), bias, self.labels)

    def take(self, rows: Any) -> Problem:
        return self._replace(hidden=self.hidden[rows], labels=self.labels[rows])


def problem(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, *, depth: int = 16, bias: bool = True, seed: int = 0
) -> Problem:
    """Logits of standard deviation 3; random labels, the second row's ignored where there are three."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1:2] = -100 if rows > 2 else labels[1:2]
    whole = Problem(randn(rows, depth), randn(vocab, depth) * 3 / depth**0.5, randn(vocab) if bias else None, labels)
    return whole.to(dtype)


class Run(NamedTuple):
    stats: TokenStats
    gradients: dict[str, Tensor]


def sources_of(mode: str) -> tuple[str, ...]:
    return ("hidden",) if mode == "frozen" else ("hidden", "weight", "bias")


def differentiate(
    function: Callable[..., TokenStats], inputs: Problem, upstream: Tensor, sources: Sequence[str], **options: Any
) -> Run:
    """Statistics, and the gradients of their sum weighted by upstream [3, ...]: logprob, entropy, lse."""
    leaves = {
        name: tensor.detach().requires_grad_(name in sources)
        for name, tensor in inputs._asdict().items()
        if name != "labels" and tensor is not None
    }
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    stats = function(hidden, weight, inputs.labels, bias=bias, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = [g.to(s.dtype) for g, s in zip(upstream, stats, strict=True)]
    gradients = torch.autograd.grad(list(stats), list(wanted.values()), grads)
    return Run(TokenStats(*(s.detach() for s in stats)), dict(zip(wanted, gradients, strict=True)))


def ours(inputs: Problem, upstream: Tensor, mode: str, **options: Any) -> Run:
    return differentiate(linear_token_stats, inputs, upstream, sources_of(mode), impl="cpu", mode=mode, **options)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, **options: Any) -> TokenStats:
    """What one writes without this op: logits in the inputs' type."""
    return token_stats_reference(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities and NaN agree."""
    result, exact = result.double(), exact.double()
    same = (result == exact) | (result.isnan() & exact.isnan())
    difference = (result - exact).abs().masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def exact_run(inputs: Problem, upstream: Tensor, mode: str, **options: Any) -> Run:
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items() if k != "chunk"}
    return differentiate(
        linear_token_stats_reference, inputs.to(torch.float64), upstream.double(), sources_of(mode), **options
    )


def assert_close_to_exact(result: Run, inputs: Problem, upstream: Tensor, mode: str, **options: Any) -> None:
    """Statistics as good as from float32 logits whatever the inputs' type, gradients as eager's in that type."""
    dtype = inputs.hidden.dtype
    wide = dtype == torch.float64
    exact = exact_run(inputs, upstream, mode, **options)
    plain = {k: v for k, v in options.items() if k != "chunk"}
    from_float = differentiate(linear_token_stats_reference, inputs, upstream, sources_of(mode), **plain)
    same_dtype = differentiate(eager, inputs, upstream, sources_of(mode), **plain)
    tolerance = 1e-12 if wide else 1e-5
    for name in TokenStats._fields:
        value, truth = getattr(result.stats, name), getattr(exact.stats, name)
        assert value.dtype == (torch.float64 if wide else torch.float32)
        assert error(value, truth) <= error(getattr(from_float.stats, name), truth) + tolerance, name
    assert result.gradients.keys() == exact.gradients.keys()
    for name, truth in exact.gradients.items():
        value = result.gradients[name]
        assert value.dtype == dtype
        assert value.shape == truth.shape
        # The logits' gradient is rounded where bfloat16 is multiplied as such, as it is in eager.
        rounding = 1e-2 if dtype == torch.bfloat16 else 0.0
        assert error(value, truth) <= error(same_dtype.gradients[name], truth) + max(tolerance, rounding), name


@pytest.mark.parametrize("row_temperature", [False, True], ids=["temperature", "row temperature"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_float64(
    mode: str, dtype: torch.dtype, bias: bool, softcap: float | None, row_temperature: bool
) -> None:
    inputs = problem(7, 5003, dtype, bias=bias)
    upstream = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": torch.linspace(0.5, 1.5, 7) if row_temperature else 0.7}
    options["softcap"] = softcap
    assert_close_to_exact(ours(inputs, upstream, mode, **options), inputs, upstream, mode, **options)


@pytest.mark.parametrize("chunk", [1, 2 * PIECE])  # one piece; two
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_boundary_of_chunks(mode: str, dtype: torch.dtype, vocab: int, chunk: int) -> None:
    inputs = problem(5, vocab, dtype, seed=vocab)
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    assert_close_to_exact(ours(inputs, upstream, mode, chunk=chunk), inputs, upstream, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_cross_blocks(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 rows: 9 labelled ones are three blocks, 10 have a ragged last one. One ignored, one unused."""
    monkeypatch.setattr(_linear_plan, "SCRATCH_BYTES", 3 * PIECE * 4)
    for count in (10, 11, 12):
        inputs = problem(count, 4099, dtype)
        upstream = torch.randn(3, count, generator=torch.Generator().manual_seed(3))
        upstream[:, 4] = 0
        result = ours(inputs, upstream, mode, temperature=torch.linspace(0.5, 1.5, count))
        assert_close_to_exact(result, inputs, upstream, mode, temperature=torch.linspace(0.5, 1.5, count))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    inputs = problem(4, 2051, torch.float64, depth=3)
    hidden = inputs.hidden.requires_grad_()
    # Few columns are trained: gradcheck evaluates once an element.
    columns = torch.tensor([0, 1, PIECE, 2050])
    assert inputs.bias is not None
    trained = [inputs.weight[columns].clone(), inputs.bias[columns].clone()]
    if mode != "frozen":
        trained = [t.requires_grad_() for t in trained]
    temperature = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 0.5
    labels = torch.tensor([PIECE, -100, 0, 77])

    def statistics(hidden: Tensor, some_weight: Tensor, some_bias: Tensor) -> TokenStats:
        assert inputs.bias is not None
        weight = inputs.weight.index_copy(0, columns, some_weight)
        bias = inputs.bias.index_copy(0, columns, some_bias)
        return linear_token_stats(
            hidden, weight, labels, bias=bias, temperature=temperature, softcap=6.0, impl="cpu", mode=mode
        )

    assert torch.autograd.gradcheck(statistics, (hidden, *trained))


@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str, dtype: torch.dtype, ignored: bool) -> None:
    hidden, weight, bias, labels = problem(4, 2100, dtype, depth=5)
    if not ignored:
        labels[1] = 3
    trained = mode != "frozen"
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    assert bias is not None
    bias.requires_grad_(trained)
    rest = (labels, torch.rand(4) + 0.5, 1.0, 5.0, -100, mode, PIECE)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not (ignored and mode == "keep"):  # what ignored rows leave of the kept logits is never written, or the same
        checks.append("test_aot_dispatch_dynamic")
    forward = (hidden, weight, bias, *rest)
    torch.library.opcheck(torch.ops.irlfast.linear_token_stats.default, forward, test_utils=checks)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    *_, state, saved = torch.ops.irlfast.linear_token_stats(hidden, weight, bias, *rest)
    grads = (torch.tensor([1.0, 2.0, 0.0, -1.0]), None, torch.tensor([0.5, 0.0, 0.0, 1.0]))
    backward = (hidden, weight, bias, *rest, state, saved, *grads, [True, trained, trained])
    torch.library.opcheck(torch.ops.irlfast.linear_token_stats_backward.default, backward)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode: str) -> None:
    torch.compiler.reset()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        stats = linear_token_stats(hidden * 2, weight, labels, temperature=temperature, softcap=9.0, mode=mode)
        return (stats.logprob + 0.1 * stats.entropy - stats.lse).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (4, 6):
        hidden, weight, _, labels = problem(rows, 2100)
        temperature = torch.linspace(0.5, 1.0, rows)
        leaves = [hidden.requires_grad_()] + ([] if mode == "frozen" else [weight.requires_grad_()])
        value, expected = (f(hidden, weight, labels, temperature) for f in (compiled, loss))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_computes_as_linear_would(impl: str) -> None:
    """Inputs rounded to bfloat16, as torch.nn.functional.linear has them; logits not, and gradients come back wide."""
    inputs = problem(6, 2100)
    upstream = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = differentiate(linear_token_stats, inputs, upstream, sources_of("keep"), impl=impl)
    rounded = differentiate(
        linear_token_stats, inputs.to(torch.bfloat16), upstream, sources_of("keep"), impl=impl, mode="keep"
    )
    for name in TokenStats._fields:
        assert torch.equal(getattr(result.stats, name), getattr(rounded.stats, name)), name
    for name, gradient in result.gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, rounded.gradients[name].float(), rtol=1e-2, atol=1e-3)
    exact = exact_run(inputs.to(torch.bfloat16), upstream, "keep")
    assert error(result.stats.logprob, exact.stats.logprob) < 1e-5


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_leaves_float64_alone(impl: str) -> None:
    inputs = problem(4, 50, torch.float64)
    hidden, weight, bias, labels = inputs
    plain = linear_token_stats(hidden, weight, labels, bias=bias, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = linear_token_stats(hidden, weight, labels, bias=bias, impl=impl)
        with pytest.raises(TypeError, match=r"weight is torch.float64, hidden torch.bfloat16"):
            linear_token_stats(hidden.float(), weight, labels, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))


# --- What no chunk, block, thread or neighbour may change.


def exact_problem(count: int, vocab: int, seed: int, *, first_is_highest: bool = False) -> Problem:
    """Every product has one term, so that no order of additions can show: row n's state is x_n e_n, column n of the
    head has one entry, and the other logits are integers that the bias brings.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.diag(torch.randint(1, 4, (count,), generator=generator).float())
    weight = torch.zeros(vocab, count)
    weight[torch.randint(vocab, (count,), generator=generator), torch.arange(count)] = 2.0
    bias = torch.randint(-8, 9, (vocab,), generator=generator).float()
    if first_is_highest:
        bias[0] = 20.0
    return Problem(hidden, weight, bias, torch.randint(vocab, (count,), generator=generator))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equal_runs(a: Run, b: Run, what: object) -> None:
    for name in TokenStats._fields:
        assert torch.equal(getattr(a.stats, name), getattr(b.stats, name)), (name, what)
    for name, gradient in a.gradients.items():
        assert torch.equal(gradient, b.gradients[name]), (name, what)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_chunk_block_and_thread_count(
    mode: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where E rises from chunk to chunk it is rescaled, and rounded, as often as there are chunks.
    inputs = exact_problem(13, 9001, 6, first_is_highest=mode == "frozen")._replace(bias=None)
    full = exact_problem(13, 9001, 6, first_is_highest=mode == "frozen")
    upstream = torch.randn(3, 13, generator=torch.Generator().manual_seed(6))
    if mode == "frozen":
        upstream[1] = 0  # the entropy's gradient is summed over chunks beside E's, and that sum is rounded

    def run(chunk: int) -> Run:
        # The bias is no source here: its gradient is a sum over rows, which blocks cut.
        return differentiate(
            linear_token_stats, full, upstream, sources_of(mode)[:2], impl="cpu", mode=mode, chunk=chunk
        )

    assert inputs.bias is None
    threads(1)
    expected = run(PIECE)
    for count in (1, 2, 3):
        threads(count)
        for scratch in (1, 5 * PIECE * 4, 16 << 20):  # a row at a time, five (with the smallest chunk), all
            monkeypatch.setattr(_linear_plan, "SCRATCH_BYTES", scratch)
            for chunk in (PIECE, 2 * PIECE, 3 * PIECE, 5 * PIECE, 1 << 20):
                assert_equal_runs(run(chunk), expected, (count, scratch, chunk))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 7000), mode=st.sampled_from(MODES))
def test_permuting_the_batch_permutes_the_result(seed: int, vocab: int, mode: str) -> None:
    inputs = exact_problem(9, vocab, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    upstream = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    run, moved = ours(inputs, upstream, mode), ours(inputs.take(order), upstream[:, order], mode)
    for name in TokenStats._fields:
        assert torch.equal(getattr(run.stats, name)[order], getattr(moved.stats, name)), name
    assert torch.equal(run.gradients["hidden"][order], moved.gradients["hidden"])
    if mode != "frozen":
        assert torch.equal(run.gradients["weight"], moved.gradients["weight"])


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.integers(1, 9000),
    chunk=st.integers(1, 12000),
    rows=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16] if _native.bf16_product_available() else [torch.float32]),
    mode=st.sampled_from(MODES),
)
def test_any_chunk_has_the_same_bits(
    seed: int, vocab: int, chunk: int, rows: int, dtype: torch.dtype, mode: str
) -> None:
    """Of bfloat16 with any values, whose products are ours. Those of float32 are torch's, in an order of its own: there
    each has one term. E of a frozen head is rounded anew where a maximum rises, and its gradient with it.
    """
    inputs = problem(rows, vocab, dtype, seed=seed) if dtype == torch.bfloat16 else exact_problem(rows, vocab, seed)
    upstream = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed))
    one, other = (ours(inputs, upstream, mode, chunk=columns) for columns in (PIECE, chunk))
    if mode == "frozen":
        one, other = (run._replace(gradients={}) for run in (one, other))
    assert_equal_runs(one, other, (vocab, chunk))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 9000), pieces=st.integers(1, 5), mode=st.sampled_from(MODES))
def test_chunk_does_not_matter(seed: int, vocab: int, pieces: int, mode: str) -> None:
    inputs = problem(6, vocab, seed=seed)
    upstream = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    one, other = (ours(inputs, upstream, mode, chunk=chunk) for chunk in (PIECE, pieces * PIECE))
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(one.stats, name), getattr(other.stats, name), rtol=1e-6, atol=1e-6)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 5000), shift=st.floats(-150, 150), mode=st.sampled_from(MODES))
def test_shift_through_the_bias_moves_lse_alone(seed: int, vocab: int, shift: float, mode: str) -> None:
    """A running maximum that starts at 0 loses everything at -150."""
    inputs = problem(5, vocab, torch.float64, seed=seed)
    assert inputs.bias is not None
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    plain = ours(inputs, upstream, mode)
    moved = ours(inputs._replace(bias=inputs.bias + shift), upstream, mode)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(plain.stats.logprob, moved.stats.logprob, **close)
    torch.testing.assert_close(plain.stats.entropy, moved.stats.entropy, **close)
    labelled = inputs.labels != -100
    torch.testing.assert_close(plain.stats.lse + shift * labelled.double(), moved.stats.lse, **close)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(gradient, moved.gradients[name], **close)


@pytest.mark.parametrize("shift", [-150.0, 150.0])
@pytest.mark.parametrize("mode", MODES)
def test_large_shift_in_float32(mode: str, shift: float) -> None:
    inputs = problem(5, 5003)
    assert inputs.bias is not None
    inputs = inputs._replace(bias=inputs.bias + shift)
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    assert_close_to_exact(ours(inputs, upstream, mode), inputs, upstream, mode)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.integers(1, 5000),
    ranks=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    contiguous=st.booleans(),
)
def test_pieces_of_the_batch_add_up(seed: int, vocab: int, ranks: int, mode: str, contiguous: bool) -> None:
    """Gradient accumulation over consecutive pieces, and rows dealt out over ranks."""
    inputs = problem(11, vocab, torch.float64, seed=seed)
    upstream = torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))
    whole = ours(inputs, upstream, mode)
    shares = torch.arange(11).tensor_split(ranks) if contiguous else [torch.arange(r, 11, ranks) for r in range(ranks)]
    parts = [ours(inputs.take(share), upstream[:, share], mode) for share in shares]
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
    for share, part in zip(shares, parts, strict=True):
        torch.testing.assert_close(part.stats.logprob, whole.stats.logprob[share], **close)
        torch.testing.assert_close(part.gradients["hidden"], whole.gradients["hidden"][share], **close)
    for name in sources_of(mode)[1:]:
        total = torch.stack([part.gradients[name] for part in parts]).sum(0)
        torch.testing.assert_close(total, whole.gradients[name], **close)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_more_than_2_to_the_31_logits(mode: str) -> None:
    """No more than a chunk of them exists at a time but in keep mode, whose one buffer has offsets past 32 bits."""
    if mode == "keep" and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * 2**30:
        pytest.skip("the buffer takes 8 GiB, and less than 14 GiB of memory are free")
    vocab = 50_257
    inputs = problem(2**31 // vocab + 3, vocab, depth=4)
    rows = len(inputs.labels)
    ends = torch.tensor([0, rows // 2, rows - 2, rows - 1])
    # In keep mode all rows have a gradient, so that the last rows' is written where they are; elsewhere four do.
    upstream = torch.zeros(3, rows)
    upstream[:, ends] = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    if mode == "keep":
        upstream += 1e-6
    run = ours(inputs, upstream, mode)
    few = ours(inputs.take(ends), upstream[:, ends], mode)
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(run.stats, name)[ends], getattr(few.stats, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run.gradients["hidden"][ends], few.gradients["hidden"], rtol=1e-5, atol=1e-5)
    if mode != "keep":
        assert int(run.gradients["hidden"].abs().sum(1).count_nonzero()) == len(ends)


def test_ratio_to_itself_is_exactly_one() -> None:
    hidden, weight, bias, labels = problem(9, 5003)
    with torch.no_grad():
        old = linear_token_stats(hidden, weight, labels, bias=bias).logprob
    for mode in MODES:
        stats = linear_token_stats(hidden.requires_grad_(), weight, labels, bias=bias, mode=mode)
        assert torch.equal((stats.logprob - old).exp(), torch.ones(9))


# --- Layouts and degenerate batches.


def _layouts() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(8))

    return {
        "batch": lambda: (randn(2, 3, 16), randn(2100, 16)),
        "slice of positions": lambda: (randn(2, 4, 16)[:, :-1], randn(2100, 16)),
        "transposed batch": lambda: (randn(3, 2, 16).transpose(0, 1), randn(2100, 16)),
        "every other feature": lambda: (randn(2, 3, 32)[..., ::2], randn(2100, 16)),
        "features not adjacent": lambda: (randn(2, 16, 3).transpose(1, 2), randn(2100, 16)),
        "expanded rows": lambda: (randn(2, 1, 16).expand(2, 3, 16), randn(2100, 16)),
        "transposed weight": lambda: (randn(2, 3, 16), randn(16, 2100).t()),
        "slice of weight": lambda: (randn(2, 3, 16), randn(2103, 20)[3:, 2:18]),
        "one position": lambda: (randn(16), randn(2100, 16)),
    }


@pytest.mark.parametrize("name", list(_layouts()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode: str, dtype: torch.dtype, name: str) -> None:
    hidden, weight = (tensor.to(dtype) for tensor in _layouts()[name]())
    if name == "expanded rows":
        hidden = _layouts()[name]()[0][:, :1].to(dtype).expand(2, 3, 16)
    labels = torch.randint(2100, hidden.shape[:-1], generator=torch.Generator().manual_seed(9))
    inputs = Problem(hidden, weight, None, labels)
    upstream = torch.randn(3, *labels.shape, generator=torch.Generator().manual_seed(9))
    result = ours(inputs, upstream, mode)
    assert result.stats.logprob.shape == result.stats.entropy.shape == result.stats.lse.shape == labels.shape
    assert_close_to_exact(result, inputs, upstream, mode)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode: str, shape: tuple[int, ...]) -> None:
    inputs = problem(1, 2100)
    inputs = inputs._replace(hidden=torch.zeros(*shape, 16), labels=torch.zeros(shape, dtype=torch.long))
    result = ours(inputs, torch.ones(3, *shape), mode)
    assert result.stats.logprob.shape == result.stats.entropy.shape == result.stats.lse.shape == shape
    assert result.gradients["hidden"].shape == (*shape, 16)
    for name in sources_of(mode)[1:]:
        assert torch.equal(result.gradients[name], torch.zeros_like(getattr(inputs, name)))


@pytest.mark.parametrize("mode", MODES)
def test_all_rows_ignored(mode: str) -> None:
    inputs = problem(4, 2100)
    inputs = inputs._replace(hidden=torch.full((4, 16), math.nan), labels=torch.full((4,), -100))
    result = ours(inputs, torch.ones(3, 4), mode)
    assert all(torch.equal(statistic, torch.zeros(4)) for statistic in result.stats)
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name))), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_integer_labels(dtype: torch.dtype) -> None:
    hidden, weight, bias, _ = problem(4, 200)
    labels = torch.tensor([0, 199, 3, 4])
    expected = linear_token_stats(hidden, weight, labels, bias=bias).logprob
    assert torch.equal(linear_token_stats(hidden, weight, labels.to(dtype), bias=bias).logprob, expected)


# --- Extremes.


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_have_no_probability_and_no_gradient(mode: str) -> None:
    """-inf by the bias, over a whole first chunk and scattered."""
    inputs = problem(5, 5003, torch.float64)
    assert inputs.bias is not None
    inputs.bias[:PIECE] = -math.inf
    inputs.bias[PIECE + 5 :: 7] = -math.inf
    allowed = inputs.bias > -math.inf
    labels = allowed.nonzero().squeeze(1)[torch.tensor([0, 50, 99, 200, -1])]
    labels[3] = 2  # a masked label
    inputs = inputs._replace(labels=labels)
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(10))
    result = ours(inputs, upstream, mode)
    assert result.stats.logprob[3] == -math.inf
    exact = exact_run(inputs, upstream, mode)
    for name in TokenStats._fields:
        assert error(getattr(result.stats, name), getattr(exact.stats, name)) < 1e-12
    assert result.gradients["hidden"].isfinite().all()
    assert error(result.gradients["hidden"], exact.gradients["hidden"]) < 1e-11
    if mode != "frozen":
        masked = ~allowed
        masked[2] = False
        for name in ("weight", "bias"):
            assert (result.gradients[name][masked] == 0).all()
            assert error(result.gradients[name], exact.gradients[name]) < 1e-11


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("mode", MODES)
def test_row_without_a_distribution_is_nan_alone(mode: str, bad: float) -> None:
    inputs = problem(5, 4099, bias=False)
    inputs.weight.abs_()
    inputs.hidden[3] = bad  # every logit of the row
    result = ours(inputs, torch.ones(3, 5), mode)
    good = [0, 1, 2, 4]
    for name in TokenStats._fields:
        assert getattr(result.stats, name)[3].isnan()
        assert getattr(result.stats, name)[good].isfinite().all()
    assert result.gradients["hidden"][3].isnan().any()
    assert result.gradients["hidden"][good].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [7, PIECE + 7])
@pytest.mark.parametrize("mode", MODES)
def test_certain_token_keeps_its_digits(mode: str, place: int, dtype: torch.dtype) -> None:
    """A log-prob near -1e-9 and its gradient, both gone where 1 is added before the logarithm, or p taken from 1."""
    vocab, gap = 4099, 29.0
    generator = torch.Generator().manual_seed(11)
    hidden = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, -0.25]], dtype=dtype)
    weight = torch.zeros(vocab, 3, dtype=dtype)
    weight[:, 1:] = torch.randn(vocab, 2, generator=generator).to(dtype)
    weight[place] = torch.tensor([gap, 0.0, 0.0])
    inputs = Problem(hidden, weight, None, torch.full((2,), place))
    result = ours(inputs, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), mode)
    # In float64 too, 1 + 1e-9 loses half of the digits: the others are summed without the 1.
    x, w = hidden.double(), weight.double()
    gaps = x @ w.T - (x @ w.T)[:, place : place + 1]
    others = gaps.exp().index_fill(1, torch.tensor([place]), 0.0)
    logprob = -others.sum(1).log1p()
    assert -1e-8 < float(logprob[0]) < -1e-10
    torch.testing.assert_close(result.stats.logprob.double(), logprob, rtol=5e-6, atol=0)
    dlogits = (-others * logprob.exp()[:, None]).index_copy(1, torch.tensor([place]), -logprob.expm1()[:, None])
    relative = 1e-5 if dtype == torch.float32 else 2e-2
    exact = {"hidden": dlogits @ w, "weight": dlogits.T @ x}
    for name, gradient in result.gradients.items():
        difference = float((gradient.double() - exact[name]).abs().max())
        assert difference <= relative * float(exact[name].abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_at_a_real_size(dtype: torch.dtype) -> None:
    """Logits of standard deviation 3, 768 features, 50257 tokens: within 1e-5, most of it the product's, and no worse
    than eager in the same type, whose 16-bit logits are wrong by 1e-2.
    """
    inputs = problem(24, 50257, dtype, depth=768, bias=False)
    hidden, weight, _, labels = inputs
    with torch.no_grad():
        exact = linear_token_stats_reference(hidden.double(), weight.double(), labels)
        plain = eager(hidden, weight, labels, bias=None)
        for mode in MODES:
            stats = linear_token_stats(hidden, weight, labels, mode=mode)
            for name in TokenStats._fields:
                ours_error = error(getattr(stats, name), getattr(exact, name))
                eager_error = error(getattr(plain, name), getattr(exact, name))
                assert ours_error <= 1e-5, name
                assert ours_error <= eager_error + 1e-6, name  # a unit in the last place of a log-sum-exp of 16
                assert dtype == torch.float32 or ours_error <= eager_error / 500, name


# --- Rows that take no part.


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_upstream_gradient_enter_no_product(mode: str) -> None:
    """Their hidden states are NaN: had they entered one, so would the weight's gradient be."""
    inputs = problem(8, 4099)
    without = [0, 3, 7]
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(12))
    upstream[:, without] = 0
    expected = ours(inputs, upstream, mode)
    inputs.hidden[without] = math.nan
    result = ours(inputs, upstream, mode)
    assert result.stats.logprob[without].isnan().all()
    assert torch.equal(result.gradients["hidden"][without], torch.zeros(3, 16))
    assert torch.equal(expected.gradients["hidden"][without], torch.zeros(3, 16))
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_ignored_rows_enter_no_product(mode: str) -> None:
    inputs = problem(8, 4099)
    inputs.labels[[2, 5]] = -7
    inputs.labels[1] = 4000
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(13))
    expected = ours(inputs, upstream, mode, ignore_index=-7)
    inputs.hidden[[2, 5]] = math.nan
    result = ours(inputs, upstream, mode, ignore_index=-7)
    assert_equal_runs(result, expected, mode)
    for statistic in result.stats:
        assert torch.equal(statistic[[2, 5]], torch.zeros(2))
    assert torch.equal(result.gradients["hidden"][[2, 5]], torch.zeros(2, 16))


@pytest.mark.parametrize("mode", MODES)
def test_every_sparsity_of_upstream_gradients(mode: str) -> None:
    """Each row has its own subset of the three gradients, none and all among them; then each statistic alone."""
    inputs = problem(9, 4099)
    inputs.labels[1] = -100
    subset = torch.tensor([[n >> bit & 1 for n in [0, 7, *range(7)]] for bit in range(3)])
    dense = torch.randn(3, 9, generator=torch.Generator().manual_seed(14))
    upstream = dense * subset
    assert_close_to_exact(ours(inputs, upstream, mode), inputs, upstream, mode)
    for alone in range(3):
        hidden = inputs.hidden.detach().requires_grad_()
        stats = linear_token_stats(hidden, inputs.weight, inputs.labels, bias=inputs.bias, mode=mode, impl="cpu")
        (gradient,) = torch.autograd.grad(stats[alone], hidden, dense[alone])
        only = torch.zeros(3, 9)
        only[alone] = dense[alone]
        truth = exact_run(inputs, only, mode).gradients["hidden"]
        assert error(gradient, truth) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_no_upstream_gradient_at_all(mode: str) -> None:
    inputs = problem(4, 2100)
    inputs.hidden[2] = math.nan
    for name, gradient in ours(inputs, torch.zeros(3, 4), mode).gradients.items():
        assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name))), name


# --- Graphs.


@pytest.mark.parametrize("mode", MODES)
def test_backward_twice_gives_the_same(mode: str) -> None:
    hidden, weight, _, labels = problem(6, 4099)
    leaves = [hidden.requires_grad_()] + ([] if mode == "frozen" else [weight.requires_grad_()])
    stats = linear_token_stats(hidden, weight, labels, mode=mode)
    upstream = [torch.randn(6, generator=torch.Generator().manual_seed(15)) for _ in range(3)]
    first = torch.autograd.grad(stats, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(stats, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode: str) -> None:
    hidden, weight, _, labels = problem(3, 50)
    logprob = linear_token_stats(hidden.requires_grad_(), weight, labels, mode=mode, impl="cpu").logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_stats: the fused kernel has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_one_source_alone(mode: str, trained: str) -> None:
    inputs = problem(6, 4099)
    upstream = torch.randn(3, 6, generator=torch.Generator().manual_seed(16))
    result = differentiate(linear_token_stats, inputs, upstream, [trained], impl="cpu", mode=mode)
    together = ours(inputs, upstream, mode)
    assert list(result.gradients) == [trained]
    assert torch.equal(result.gradients[trained], together.gradients[trained])


def test_nothing_is_kept_without_grad() -> None:
    hidden, weight, _, labels = problem(3, 50)
    with torch.no_grad():
        stats = linear_token_stats(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert all(s.grad_fn is None and not s.requires_grad for s in stats)


def test_functional_transforms_take_the_reference() -> None:
    inputs = problem(3, 50, bias=False)

    def entropy(hidden: Tensor, impl: str) -> Tensor:
        return linear_token_stats(hidden, inputs.weight, inputs.labels, impl=impl).entropy.sum()

    expected = ours(inputs, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 3), "frozen").gradients["hidden"]
    torch.testing.assert_close(torch.func.grad(entropy)(inputs.hidden, "auto"), expected)
    with pytest.raises(RuntimeError, match=r"impl='cpu' is not available: a torch.func transform is active"):
        torch.func.grad(entropy)(inputs.hidden, "cpu")


def test_default_device_does_not_move_the_outputs() -> None:
    hidden, weight, _, labels = problem(3, 50)
    with torch.device("meta"):
        stats = linear_token_stats(hidden.requires_grad_(), weight.requires_grad_(), labels)
        gradients = torch.autograd.grad(stats.entropy, (hidden, weight), torch.ones(3, device="cpu"))
    assert all(t.device.type == "cpu" for t in (*stats, *gradients))


def test_auto_picks_the_mode() -> None:
    hidden, weight, bias, _ = problem(10, 100)

    def auto(budget: int = 10 * 100 * 4) -> str:
        return resolve_mode("auto", hidden, weight, bias, 10, budget)

    assert auto() == "recompute"  # nobody needs a gradient
    hidden.requires_grad_()
    assert auto(0) == "frozen"
    assert bias is not None
    for trained in (weight, bias):
        trained.requires_grad_()
        assert auto() == "keep"
        assert auto(10 * 100 * 4 - 1) == "recompute"
        with torch.no_grad():
            assert auto() == "recompute"
            assert resolve_mode("frozen", hidden, weight, bias, 10, 0) == "frozen"
        trained.requires_grad_(False)
    hidden, weight, bias, _ = problem(10, 100, torch.float64)
    weight.requires_grad_()
    assert auto(10 * 100 * 8 - 1) == "recompute"
    assert auto(10 * 100 * 8) == "keep"


# --- Errors.


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_label_outside_the_vocabulary_is_named(impl: str) -> None:
    hidden, weight, _, _ = problem(6, 5)
    hidden, labels = hidden.view(2, 3, 16), torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 7
    with pytest.raises(IndexError, match=r"labels\[1, 2\] = 7 is outside \[0, 5\) and is not ignore_index \(-100\)"):
        linear_token_stats(hidden, weight, labels, impl=impl)
    labels[1, 2] = -1
    with pytest.raises(IndexError, match=r"labels\[1, 2\] = -1 is outside"):
        linear_token_stats(hidden, weight, labels, impl=impl)
    assert linear_token_stats(hidden, weight, labels, ignore_index=-1, impl=impl).logprob[1, 2] == 0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature = 0.0 is not a positive finite number"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature of row 1 = -2.0"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature of shape \(3,\) does not broadcast to the rows \(2,\)",
        ),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature requires grad"),
        ({"softcap": -1.0}, ValueError, "softcap = -1.0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels have shape \(3,\), expected \(2,\)"),
        ({"labels": torch.zeros(2)}, TypeError, "labels are torch.float32, expected integers"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, TypeError, "labels are torch.bool, expected integers"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "labels is on meta, hidden on cpu"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "hidden is torch.int32, expected one of"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"labels have shape \(2,\), expected \(\) for hidden \(\)"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight has shape \(5, 3\), expected \[V, 4\]"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight has shape \(4,\), expected \[V, 4\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight has shape \(0, 4\), expected \[V, 4\]"),
        ({"weight": torch.zeros(5, 4).half()}, TypeError, "weight is torch.float16, hidden torch.float32"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight is on meta, hidden on cpu"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\), expected \(5,\)"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias is torch.float64, hidden torch.float32"),
        ({"mode": "fast"}, ValueError, "mode='fast' is unknown; expected one of 'auto', 'recompute', 'keep', 'frozen'"),
        ({"memory_budget": -1}, ValueError, "memory_budget = -1 is negative"),
        ({"chunk": 0}, ValueError, "chunk = 0; expected a positive number of columns"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], exception: type[Exception], message: str, impl: str
) -> None:
    defaults: dict[str, Any] = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4)}
    defaults["labels"] = torch.zeros(2, dtype=torch.long)
    with pytest.raises(exception, match=f"{'' if 'row 1' in message else 'linear_token_stats: '}{message}"):
        linear_token_stats(**{**defaults, **arguments}, impl=impl)


def test_frozen_mode_with_a_trained_head_is_refused() -> None:
    hidden, weight, bias, labels = problem(3, 50)
    assert bias is not None
    for trained in (weight, bias):
        trained.requires_grad_()
        with pytest.raises(ValueError, match=r"mode='frozen' with a weight or bias that requires grad"):
            linear_token_stats(hidden, weight, labels, bias=bias, mode="frozen")
        trained.requires_grad_(False)
    # The op itself, past that check, has no gradient of the head to make up.
    arguments = (labels, None, 1.0, 0.0, -100, "frozen", PIECE)
    logprob = torch.ops.irlfast.linear_token_stats(hidden, weight.requires_grad_(), None, *arguments)[0]
    with pytest.raises(RuntimeError, match="mode='frozen' has no gradient of weight and bias"):
        logprob.sum().backward()


def test_unavailable_implementations_say_why() -> None:
    hidden, weight, _, labels = problem(3, 50)
    with pytest.raises(RuntimeError, match="impl='cuda' is not available: this release has no CUDA kernel"):
        linear_token_stats(hidden, weight, labels, impl="cuda")
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        linear_token_stats(hidden, weight, labels, impl="fast")
    with pytest.raises(RuntimeError, match="impl='cpu' is not available: the tensor is on meta"):
        linear_token_stats(hidden.to("meta"), weight.to("meta"), labels.to("meta"), impl="cpu")


def test_native_code_refuses_null_and_nonsense() -> None:
    # logits, dtype, stride, rows, first column, columns, labels, temperature, its rows, softcap
    chunk: list[Any] = [0, 0, 5, 2, 0, 5, 0, 1.0, 0, 0.0]
    with pytest.raises(ValueError, match="logits is a null pointer"):
        _native.linear_token_stats_merge(*chunk, 0, 2, True, 1, "auto")
    with pytest.raises(ValueError, match="first_column = 5 is no multiple of 2048"):
        _native.linear_token_stats_merge(*chunk[:4], 5, *chunk[5:], 0, 2, True, 1, "auto")
    with pytest.raises(ValueError, match="vocab = 0 is below 1"):
        _native.linear_token_stats_merge(*chunk[:5], 0, *chunk[6:], 0, 2, True, 1, "auto")
    logits, labels, state = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), torch.zeros(4, 2)
    chunk[0], chunk[6] = logits.data_ptr(), labels.data_ptr()
    with pytest.raises(ValueError, match="running is a null pointer"):
        _native.linear_token_stats_merge(*chunk, 0, 2, True, 1, "auto")
    with pytest.raises(ValueError, match="the gradient has the logits' type, or bfloat16 for float32 logits"):
        _native.linear_token_stats_differentiate(
            *chunk, 0, state.data_ptr(), 0, 0, 0, logits.data_ptr(), 1, 5, 1, "auto"
        )
    with pytest.raises(ValueError, match="the gradient is a null pointer"):
        _native.linear_token_stats_exponentials(*chunk, state.data_ptr(), 0, 0, 5, 1, "auto")


# --- The epilogue by itself, on each instruction set.


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_epilogue_of_every_instruction_set(isa: str, dtype: torch.dtype, softcap: float) -> None:
    """Logits in chunks of 2 pieces and a ragged rest, against token_stats on the whole of them."""
    torch.manual_seed(17)
    vocab, count = 5003, 6
    logits = (torch.randn(count, vocab, dtype=torch.float64) * 3).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.rand(count, dtype=wide) + 0.5
    rows = Rows(torch.randint(vocab, (count,)), temperature, 1.0, softcap)
    upstream = Upstream(*(torch.randn(count, dtype=wide) for _ in range(3)))
    epilogue = CpuEpilogue(isa)
    running = torch.zeros(4, count, dtype=torch.float64)
    running[0] = -math.inf
    pieces = [(begin, logits[:, begin : begin + 2 * PIECE]) for begin in range(0, vocab, 2 * PIECE)]
    for begin, part in pieces:
        epilogue.merge(part.contiguous(), begin, rows, running, weighted=True)
    finished = finish(running, rows, wide)
    leaf = logits.detach().requires_grad_()
    expected = token_stats(leaf, rows.labels, temperature=temperature, softcap=softcap or None)
    tolerance: dict[str, Any] = (
        {"rtol": 2e-6, "atol": 2e-6} if wide == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    )
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(finished, name), getattr(expected, name), **tolerance)

    (gradient,) = torch.autograd.grad(expected, leaf, list(upstream))
    chosen = torch.tensor([5, 0, 3])
    targets = {dtype} | ({torch.bfloat16} if dtype == torch.float32 else set())
    for target in targets:
        for begin, part in pieces:
            out = torch.empty(3, part.shape[1], dtype=target)
            epilogue.differentiate(
                part.contiguous(),
                begin,
                rows.take(chosen),
                finished.state[:, chosen],
                upstream.take(chosen),
                out,
                row_numbers=chosen,
            )
            truth = gradient[chosen, begin : begin + 2 * PIECE].to(target)
            torch.testing.assert_close(out, truth, rtol=1e-2 if target.itemsize == 2 else 2e-6, atol=1e-6)
            exponentials = torch.empty_like(part.contiguous(), dtype=target)
            epilogue.exponentials(part.contiguous(), begin, rows, running[0], exponentials)
            capped = softcap * torch.tanh(part.to(wide) / softcap) if softcap else part.to(wide)
            slope = 1 - (capped / softcap) ** 2 if softcap else 1.0
            truth = ((capped - running[0][:, None].to(wide)) / temperature[:, None]).exp() * slope
            inside = (rows.labels >= begin) & (rows.labels < begin + part.shape[1])
            truth[inside, rows.labels[inside] - begin] = 0
            rounding = 1e-2 if target.itemsize == 2 else 4e-6
            torch.testing.assert_close(exponentials, truth.to(target), rtol=rounding, atol=1e-6)
            assert (exponentials[inside, rows.labels[inside] - begin] == 0).all()


def test_dlogits_have_the_same_bits_in_any_chunk(threads: Callable[[int], None]) -> None:
    torch.manual_seed(18)
    logits = torch.randn(30, 9001) * 3
    rows = Rows(torch.randint(9001, (30,)), None, 0.8, 0.0)
    upstream = Upstream(*(torch.randn(30) for _ in range(3)))
    results = []
    for count, chunk in ((1, PIECE), (1, 3 * PIECE), (2, 2 * PIECE), (3, 5 * PIECE)):
        threads(count)
        running = torch.zeros(4, 30, dtype=torch.float64)
        running[0] = -math.inf
        parts = [(begin, logits[:, begin : begin + chunk].contiguous()) for begin in range(0, 9001, chunk)]
        for begin, part in parts:
            CpuEpilogue().merge(part, begin, rows, running, weighted=True)
        state = finish(running, rows, torch.float32).state
        gradients = [torch.empty_like(part) for _, part in parts]
        for (begin, part), out in zip(parts, gradients, strict=True):
            CpuEpilogue().differentiate(part, begin, rows, state, upstream, out, row_numbers=None)
        results.append((running, torch.cat(gradients, dim=1)))
    for running, gradient in results[1:]:
        assert torch.equal(running, results[0][0])
        assert torch.equal(gradient, results[0][1])


# --- Breaks on purpose, which the comparisons above notice.


class DropsARise(CpuEpilogue):
    """Adds up a chunk as if the maximum of before were still the highest."""

    def merge(self, logits: Tensor, first_column: int, rows: Rows, running: Tensor, *, weighted: bool) -> None:
        before = running[0].clone()
        super().merge(logits, first_column, rows, running, weighted=weighted)
        running[0] = torch.where(before > -math.inf, before, running[0])


class KeepsTheLabel(CpuEpilogue):
    """Sums E over the whole vocabulary, the label's own probability with it."""

    def exponentials(self, logits: Tensor, first_column: int, rows: Rows, maximum: Tensor, out: Tensor) -> None:
        elsewhere = rows._replace(labels=torch.full_like(rows.labels, 1 << 40))
        super().exponentials(logits, first_column, elsewhere, maximum, out)


class TorchWithoutRescaling:
    """torch, but what `sweep` has summed before is never rescaled."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def where(condition: Tensor, rise: Tensor, unchanged: float) -> Tensor:
        return torch.full_like(rise, unchanged)


@pytest.mark.parametrize(
    ("broken", "mode", "complaint"),
    [("DropsARise", "recompute", "logprob"), ("KeepsTheLabel", "frozen", "hidden"), ("rescaling", "frozen", "hidden")],
)
def test_a_broken_epilogue_is_noticed(broken: str, mode: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(7, 5003)
    upstream = torch.randn(3, 7, generator=torch.Generator().manual_seed(19))
    assert_close_to_exact(ours(inputs, upstream, mode), inputs, upstream, mode)
    if broken == "rescaling":
        monkeypatch.setattr(chunked, "torch", TorchWithoutRescaling())
    else:
        monkeypatch.setattr(sys.modules["irlfast.ops.linear_token_stats"], "CpuEpilogue", globals()[broken])
    with pytest.raises(AssertionError, match=complaint):
        assert_close_to_exact(ours(inputs, upstream, mode), inputs, upstream, mode)


def test_the_sweep_is_the_same_whatever_it_keeps() -> None:
    inputs = problem(6, 5003)
    head = Head(weight=inputs.weight, bias=inputs.bias)
    sizes = Sizes.of(inputs.hidden, 5003, 6)
    plan, kept_plan, expected_plan = (plan_forward(sizes, mode, PIECE) for mode in MODES)
    rows = Rows(inputs.labels.clamp(min=0), None, 1.0, 0.0)
    epilogue: Epilogue = CpuEpilogue()
    kept, expected = torch.empty(6 * 5003), torch.empty(6, 16)
    plain = sweep(inputs.hidden, head, rows, epilogue, plan, weighted=True)
    with_kept = sweep(inputs.hidden, head, rows, epilogue, kept_plan, weighted=True, kept=kept)
    with_expected = sweep(inputs.hidden, head, rows, epilogue, expected_plan, weighted=True, expected=expected)
    assert torch.equal(plain, with_kept)
    assert torch.equal(plain, with_expected)
    assert inputs.bias is not None
    logits = inputs.hidden.double() @ inputs.weight.double().T + inputs.bias.double()
    torch.testing.assert_close(
        kept[6 * 2 * PIECE :].view(6, 907).double(), logits[:, 2 * PIECE :], rtol=1e-5, atol=1e-5
    )
    p = logits.softmax(-1).scatter(1, rows.labels[:, None], 0.0)
    torch.testing.assert_close(expected.double(), p @ inputs.weight.double(), rtol=1e-5, atol=1e-6)


# --- Memory.

_PEAK = """
import json, sys
import torch
from irlfast.ops import linear_token_stats
sys.path.append(sys.argv[1])
from bench._case import Contender
from bench._harness import peak_mib
mode, rows, depth, vocab = sys.argv[2], *map(int, sys.argv[3:])
hidden = torch.randn(rows, depth, requires_grad=True)
weight = (torch.randn(vocab, depth) * 0.05).requires_grad_(mode != "frozen")
labels = torch.randint(vocab, (rows,))
sources = [hidden] if mode == "frozen" else [hidden, weight]

def run(x):
    stats = linear_token_stats(x, weight, labels[: len(x)], mode=mode)
    return torch.autograd.grad((stats.logprob + stats.lse).sum(), sources)

run(hidden[:8])  # what libraries allocate once and for all
print(json.dumps(peak_mib(Contender(name=mode, family="ours", run=lambda: run(hidden)))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["recompute", "frozen"])
def test_peak_memory(mode: str, tmp_path: Path) -> None:
    """At most 40 MiB beside inputs and the gradients handed out, where the logits alone are 197 MiB."""
    command = [sys.executable, "-c", _PEAK, str(ROOT), mode, "1024", "768", "50304"]
    # Elsewhere, so that `irlfast` is the installed one.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    if measured is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    with_gradients, without = measured
    assert without <= 40
    assert with_gradients >= (3 if mode == "frozen" else 150)  # MiB of the gradients themselves: the peak was seen
