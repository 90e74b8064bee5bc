"""The allocation plan of the linear ops: what it promises, and that a run allocates it, no more and no less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from irlfast import _native
from irlfast.ops import _linear_plan, _product, linear_token_loss, linear_token_stats
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_cpu import CpuEpilogue
from irlfast.ops._linear_modes import backward_chunked, forward_chunked
from irlfast.ops._linear_pair import Models, backward_pair, forward_pair
from irlfast.ops._linear_pair_cpu import CpuPairEpilogue
from irlfast.ops._linear_plan import (
    GPU_WORKSPACE_BYTES,
    PIECE,
    TILE,
    Plan,
    Sizes,
    plan_backward,
    plan_forward,
    plan_scaling,
    whole_pieces,
)

MODES = ["recompute", "keep", "frozen"]
MIB = 1 << 20
NATIVE = _native.bf16_product_available()
FULL = Sizes(
    rows=32768, depth=4096, vocab=151936, dtype=torch.bfloat16, factors=torch.bfloat16, gpu=True
)  # Qwen3-8B's head
ALL = (True, True, False)


class Silent:
    """An epilogue that leaves the logits alone."""

    compacts = False

    def __init__(self) -> None:
        self.alone = self

    def merge(self, *given: Any, **options: Any) -> None: ...
    def exponentials(self, *given: Any, **options: Any) -> None: ...
    def differentiate(self, *given: Any, **options: Any) -> None: ...


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and products of a GPU for tensors of the CPU that have no memory: elsewhere, torch without CUDA stops."""
    of = Sizes.of
    monkeypatch.setattr(Sizes, "of", lambda *given: replace(of(*given), gpu=True, adds=True, rounds=False))
    monkeypatch.setattr(_product, "_NATIVE", True)
    monkeypatch.setattr(_product, "_bf16_cpu", lambda *given: _product._cuda(*given, None))


def big(sizes: list[int], rows: int) -> list[int]:
    """All but vectors, of which none has more than eight float64 a row."""
    return sorted(size for size in sizes if size > 64 * rows)


def expected(plan: Plan, rows: int, *more: int) -> list[int]:
    buffers = [buffer.nbytes for buffer in plan.buffers] + ([plan.kept.nbytes] if plan.kept else [])
    return big([*buffers, *more], rows)


def test_peak_of_a_large_trained_head() -> None:
    """The bar: 768 MiB above inputs and gradients, of which dX in float32 is 512."""
    forward, backward = plan_forward(FULL, "recompute"), plan_backward(FULL, "recompute", ALL, masked=True)
    assert max(forward.nbytes, backward.nbytes) <= 768 * MIB
    assert max(buffer.nbytes for buffer in backward.buffers) == 512 * MIB
    # No float32 copy of the head, and no more of it than a chunk.
    assert all(buffer.nbytes <= 64 * MIB for buffer in backward.buffers if buffer.name == "weight gradient")
    older = replace(FULL, adds=False)  # a torch whose products do not add to float32 sums
    assert plan_backward(older, "recompute", ALL, masked=True).nbytes <= 768 * MIB


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_run_of_that_size_allocates_the_plan() -> None:
    """The very loops, on tensors without memory: every allocation counted."""
    with FakeTensorMode():
        hidden = torch.empty(32768, 4096, dtype=torch.bfloat16)
        weight = torch.empty(151936, 4096, dtype=torch.bfloat16)
        labels = torch.empty(32768, dtype=torch.long)
        grads = [torch.empty(32768) for _ in range(3)]
        options = (None, 1.0, 0.0, -100, "recompute", 0)
        with Allocations([hidden, weight, labels, *grads]) as forward:
            *_, state, saved = forward_chunked(Silent(), hidden, weight, None, labels, *options)
        plan = plan_forward(FULL, "recompute")
        assert big(forward.sizes, 32768) == expected(plan, 32768)
        assert plan.nbytes - plan.vector_bytes <= forward.peak <= plan.nbytes
        with Allocations([hidden, weight, labels, *grads, state, saved]) as backward:
            of_hidden, of_weight, _ = backward_chunked(
                Silent(), hidden, weight, None, labels, *options, state, saved, *grads, [True, True, False]
            )
    gradients = [g.untyped_storage().nbytes() for g in (of_hidden, of_weight)]
    plan = plan_backward(FULL, "recompute", ALL, masked=True)
    assert big(backward.sizes, 32768) == expected(plan, 32768, *gradients)
    assert plan.nbytes - plan.vector_bytes <= backward.peak - sum(gradients) <= plan.nbytes
    assert backward.peak - sum(gradients) <= 768 * MIB
    product = 2 * 32768 * 4096 * 151936
    assert forward.flop == product
    assert backward.flop == 3 * product


def batch(rows: int, depth: int, vocab: int, dtype: torch.dtype, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(vocab, (rows,))
    labels[:ignored] = -100
    return torch.randn(rows, depth).to(dtype), torch.randn(vocab, depth).to(dtype) * 0.1, labels


@pytest.mark.parametrize("ignored", [0, 7])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not NATIVE, reason="no AVX512_BF16"))],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_the_cpu_allocates_the_plan(
    mode: str, dtype: torch.dtype, entropy: bool, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of rows, three chunks."""
    monkeypatch.setattr(_linear_plan, "SCRATCH_BYTES", 15 * PIECE * 4)
    rows, depth, vocab = 40, 96, 5003
    hidden, weight, labels = batch(rows, depth, vocab, dtype, ignored)
    options = (None, 1.0, 0.0, -100, mode, 0)
    with Allocations([hidden, weight, labels]) as forward:
        *_, state, saved = forward_chunked(CpuEpilogue(), hidden, weight, None, labels, *options)
    sizes = Sizes.of(hidden, vocab, rows - ignored)
    plan = plan_forward(sizes, mode, of=rows)
    assert big(forward.sizes, rows) == expected(plan, rows)
    assert forward.peak <= plan.nbytes
    grads = [torch.ones(rows), torch.ones(rows) if entropy else None, torch.ones(rows)]
    needs = [True, mode != "frozen", False]
    with Allocations([hidden, weight, labels, state, saved, *grads]) as backward:
        gradients = backward_chunked(CpuEpilogue(), hidden, weight, None, labels, *options, state, saved, *grads, needs)
    plan = plan_scaling(sizes, entropy, of=rows) if mode == "frozen" else plan_backward(sizes, mode, ALL, of=rows)
    nbytes = [g.untyped_storage().nbytes() for g, need in zip(gradients, needs, strict=True) if need]
    assert big(backward.sizes, rows) == expected(plan, rows, *nbytes)
    assert backward.peak <= plan.nbytes + sum(nbytes)


PRODUCTS = {("recompute", True): (1, 3), ("keep", True): (1, 2), ("frozen", False): (2, 0)}
PRODUCTS |= {("recompute", False): (1, 2), ("keep", False): (1, 1)}


@pytest.mark.parametrize(("mode", "trained"), PRODUCTS, ids=str)
def test_products_of_each_mode(mode: str, trained: bool) -> None:
    """In units of rows x depth x vocabulary; a gradient of the entropy costs a frozen head two more. All in float32."""
    hidden, weight, labels = batch(40, 16, 5003, torch.float32, 0)
    product = 2 * 40 * 16 * 5003
    options = (None, 1.0, 0.0, -100, mode, 0)
    with Allocations([]) as forward:
        *_, state, saved = forward_chunked(CpuEpilogue(), hidden, weight, None, labels, *options)
    ones, needs = torch.ones(40), [True, trained, False]
    before, after = PRODUCTS[mode, trained]
    assert forward.flop == before * product
    for entropy in (None, ones):
        with Allocations([]) as backward:
            backward_chunked(
                CpuEpilogue(), hidden, weight, None, labels, *options, state, saved, ones, entropy, None, needs
            )
        assert backward.flop == (after + 2 * (mode == "frozen" and entropy is not None)) * product
    upstream = torch.zeros(40)
    upstream[:10] = 1.0  # a quarter of the rows has a gradient
    with Allocations([]) as backward:
        backward_chunked(
            CpuEpilogue(), hidden, weight, None, labels, *options, state, saved, upstream, None, None, needs
        )
    assert backward.flop * 4 == after * product


@pytest.mark.parametrize("trained", [False, True])
def test_products_of_one_pass(trained: bool) -> None:
    """Three, two for a frozen head, all of them with the loss."""
    hidden, weight, labels = batch(40, 16, 5003, torch.float32, 0)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with Allocations([]) as forward:
        loss = linear_token_loss(hidden, weight, labels, lambda stats, rows: stats.logprob.sum())
    with Allocations([]) as backward:
        loss.backward()
    assert forward.flop == (2 + trained) * 2 * 40 * 16 * 5003
    assert backward.flop == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_a_gpu_on_the_cpu(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops with the plan of a GPU, in three blocks of rows and three chunks: what they give in one block."""
    hidden, weight, labels = batch(300, 16, 5003, dtype, 40)
    upstream = torch.randn(3, 300)

    def run() -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(mode != "frozen")]
        stats = linear_token_stats(*leaves, labels, mode=mode, temperature=torch.linspace(0.5, 1.5, 300))  # type: ignore[arg-type]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [*(s.detach() for s in stats), *torch.autograd.grad(stats, wanted, list(upstream))]

    expected = run()
    of = Sizes.of
    monkeypatch.setattr(Sizes, "of", lambda *given: replace(of(*given), gpu=True))
    monkeypatch.setattr(_linear_plan, "_least_time", lambda *given: (TILE, PIECE))
    assert plan_forward(Sizes.of(hidden, 5003, 260), mode).blocks(260)[-1] == slice(256, 260)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    for place, (value, truth) in enumerate(zip(run(), expected, strict=True)):
        if place < 3 and dtype == torch.bfloat16 and NATIVE:
            assert torch.equal(value, truth)
        torch.testing.assert_close(value, truth, rtol=close, atol=close)


def test_an_allocation_that_is_not_planned_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Plan.new
    monkeypatch.setattr(Plan, "new", lambda plan, name, like: (like.new_empty(50_000), new(plan, name, like))[1])
    with pytest.raises(AssertionError):
        test_a_run_on_the_cpu_allocates_the_plan("recompute", torch.float32, False, 0, monkeypatch)


def products_of_pair(epilogue: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[int]:
    """FLOP forward, backward, and backward where no divergence has a gradient."""
    models = Models(weight, None, weight, None)
    rows = Rows(labels, None, 1.0, 0.0, hidden)
    with Allocations([]) as forward:
        *_, running = forward_pair(epilogue, hidden, models, rows, -100, 0)
    flop = [forward.flop]
    ones = torch.ones(len(labels))
    for kl in (ones, None):
        with Allocations([]) as backward:
            upstream = Upstream(ones, None, None, kl, None)
            backward_pair(epilogue, hidden, models, rows, -100, 0, running, upstream, [True, True, False])
        flop.append(backward.flop)
    return flop


def test_products_of_policy_and_reference() -> None:
    """Two forward and four backward, three where no divergence has a gradient."""
    product = 2 * 300 * 32 * 5003
    counted = products_of_pair(CpuPairEpilogue(), *batch(300, 32, 5003, torch.float32, 0))
    assert counted == [2 * product, 4 * product, 3 * product]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_products_of_policy_and_reference_as_on_a_gpu() -> None:
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 1024, dtype=torch.bfloat16) for n in (8192, 151936))
        counted = products_of_pair(Silent(), hidden, weight, torch.empty(8192, dtype=torch.long))
    product = 2 * 8192 * 1024 * 151936
    assert counted == [2 * product, 4 * product, 3 * product]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 1 << 17),
    depth=st.sampled_from([64, 768, 1024, 3584, 4096, 8192]),
    vocab=st.sampled_from([1, 2049, 50304, 151936, 256000]),
    half=st.booleans(),
    adds=st.booleans(),
    chunk=st.sampled_from([0, 0, 1, 5000]),
    mode=st.sampled_from(["recompute", "keep"]),
    trained=st.booleans(),
)
def test_any_plan_on_a_gpu_fits(
    rows: int, depth: int, vocab: int, half: bool, adds: bool, chunk: int, mode: str, trained: bool
) -> None:
    """Buffers beside dX's and what is kept stay within the workspace, where a tile of rows does."""
    dtype = torch.bfloat16 if half else torch.float32
    sizes = replace(FULL, rows=rows, depth=depth, vocab=vocab, dtype=dtype, factors=dtype, adds=adds)
    chunk = whole_pieces(chunk)
    backward = plan_backward(sizes, mode, (True, trained, False), chunk, masked=trained)
    for plan in (plan_forward(sizes, mode, chunk), plan_forward(sizes, "frozen", chunk), backward):
        assert plan.rows % TILE == 0
        assert plan.columns % PIECE == 0
        assert chunk in (0, plan.columns)
        assert [begin for begin, _ in plan.chunks(vocab)] == list(range(0, vocab, plan.columns))
        covered = [row for block in plan.blocks(rows) for row in (block.start, block.stop)]
        assert covered == sorted(covered)
        assert not rows or (covered[0], covered[-1]) == (0, rows)
        work = sum(b.nbytes for b in plan.buffers if b.name not in ("hidden gradient", "masked hidden", "running"))
        width = min(plan.columns, vocab)
        least = width * depth * 8 + TILE * (width * 8 + depth * 4)  # one tile, a chunk of dW and what is added to it
        assert work <= max(GPU_WORKSPACE_BYTES, least)
    if mode == "keep":
        assert backward.columns == plan_forward(sizes, mode, chunk).columns


def test_a_plan_says_what_it_needs() -> None:
    text = plan_backward(FULL, "recompute", ALL, masked=True).describe()
    assert "   512.00 MiB  hidden gradient [32768 x 4096] torch.float32" in text
    assert text.splitlines()[-1].strip().endswith("MiB  in all")
