"""The Triton kernels on a GPU: what neither the interpreter nor the compiler can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton_cases import error, near_pair, random_logits

from irlfast import _native
from irlfast.ops import token_kl, token_logprobs, token_stats, token_stats_reference

pytestmark = pytest.mark.gpu

VOCAB = 4112  # one block and a ragged rest, rows at multiples of 16 bytes


def inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits, ref_logits = (x.to("cuda", dtype) for x in near_pair(rows, VOCAB))
    return logits, ref_logits, torch.randint(VOCAB, (rows,), device="cuda")


def loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    stats = token_stats(logits * 1, labels, temperature=0.7)
    return (stats.logprob + 0.1 * stats.entropy - stats.lse + token_kl(logits * 1, ref_logits)).sum()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_auto_never_waits(no_waiting: None) -> None:
    logits, ref_logits, labels = inputs(8)
    logits.requires_grad_()
    temperature = torch.ones(8, device="cuda")
    stats = token_stats(logits, labels, temperature=temperature)
    assert type(stats.logprob.grad_fn).__name__ == "_TokenStatsBackward"
    kl = token_kl(logits, ref_logits, temperature=temperature)
    torch.autograd.grad([*stats, kl], logits, [torch.ones(8, device="cuda")] * 4)
    token_logprobs(logits, labels[:, None].expand(8, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        logits, ref_logits, labels = inputs(rows, torch.float32)
        logits.requires_grad_()
        value, expected = (f(logits, ref_logits, labels) for f in (compiled, loss))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))


def test_opcheck() -> None:
    logits, ref_logits, labels = inputs(4, torch.float32)
    row_temperature = torch.rand(4, device="cuda") + 0.5
    leaf = logits.requires_grad_()
    arguments = (leaf, labels, row_temperature, 1.0, 5.0, -100, True, False)
    torch.library.opcheck(torch.ops.irlfast.token_stats.default, arguments)
    pair = (leaf, ref_logits.requires_grad_())
    options = (row_temperature, 1.0, 5.0, _native.DIVERGENCES["js"], 0.4)
    torch.library.opcheck(torch.ops.irlfast.token_kl.default, (*pair, *options, False))


def test_is_captured_in_a_graph() -> None:
    """Replayed on new values in the same memory."""
    logits, ref_logits, labels = inputs(8, torch.float32)
    leaf = logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(leaf, ref_logits, labels)
        return value, torch.autograd.grad(value, leaf)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.mul_(0.5)
        labels.copy_(labels.flip(0))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


def test_autocast_changes_nothing() -> None:
    logits, ref_logits, labels = inputs(8)
    with torch.autocast("cuda", torch.float16):
        inside = (*token_stats(logits, labels), token_kl(logits, ref_logits))
    for ours, expected in zip(inside, (*token_stats(logits, labels), token_kl(logits, ref_logits)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [65_535, 65_537, 200_000])
def test_many_rows(rows: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(rows, 130, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(130, (rows,), device="cuda")
    exact = token_stats_reference(logits.double(), labels)
    for ours, expected in zip(token_stats(logits, labels), exact, strict=True):
        assert error(ours, expected) <= 1e-5
    assert error(token_kl(logits, logits.flip(0))[:2], token_kl(logits.double(), logits.double().flip(0))[:2]) <= 1e-5


def test_more_than_2_to_the_31_logits() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    rows = 2**31 // 128256 + 2
    logits = torch.zeros(rows, 128256, device="cuda", dtype=torch.bfloat16)
    logits[-1] = random_logits(1, 128256)[0].to("cuda", torch.bfloat16)
    labels = torch.full((rows,), -100, device="cuda")
    labels[-1] = 77
    last = token_stats(logits[-1:].clone().requires_grad_(), labels[-1:])
    stats = token_stats(logits.requires_grad_(), labels)
    assert all(torch.equal(a[-1:], b) for a, b in zip(stats, last, strict=True))
    (gradient,) = torch.autograd.grad(stats.entropy[-1], logits)
    assert bool(gradient[-1].any())
    assert not bool(gradient[:-1].any())


@pytest.mark.parametrize("run", [lambda x, y: token_stats(x, y).entropy, lambda x, y: token_kl(x, x * 0.9)])
def test_runs_have_the_same_bits(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, _, labels = inputs(512)
    first = run(logits, labels)
    assert all(torch.equal(run(logits, labels), first) for _ in range(5))
    assert torch.equal(run(logits[100:101], labels[100:101]), first[100:101])


def test_another_device_and_stream() -> None:
    logits, ref_logits, labels = inputs(8)
    expected = (*token_stats(logits, labels), token_kl(logits, ref_logits))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = (*token_stats(logits, labels), token_kl(logits, ref_logits))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    if torch.cuda.device_count() > 1:
        far = (x.to("cuda:1") for x in (logits, labels))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(token_stats(*far), expected[:3], strict=True))
