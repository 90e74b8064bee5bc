"""The linear ops on a GPU: what neither the interpreter nor the compiler can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from irlfast.ops import _product, linear_policy_ref_stats, linear_token_loss, linear_token_stats
from irlfast.ops._linear_plan import Sizes, plan_backward, plan_forward
from irlfast.ops._product import adds_in_place
from irlfast.ops.linear_policy_ref_stats import linear_policy_ref_stats_reference
from irlfast.ops.linear_token_stats import linear_token_stats_reference

pytestmark = pytest.mark.gpu

MODES = ["recompute", "keep", "frozen", "fused"]
ROWS, DEPTH, VOCAB = 96, 64, 5008  # two whole chunks and a ragged third


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and labels; every fifth row ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, DEPTH, device="cuda", dtype=dtype)
    weight = torch.randn(VOCAB, DEPTH, device="cuda", dtype=dtype) * 0.3
    labels = torch.randint(VOCAB, (rows,), device="cuda")
    labels[::5] = -100
    return hidden, weight, torch.randn(VOCAB, device="cuda", dtype=dtype), labels


def run_stats(mode: str, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Statistics and gradients, weighted by the rows' numbers; 0 for the first ten."""
    trained = mode != "frozen"
    leaves = [hidden.detach().requires_grad_()]
    leaves += [t.detach().requires_grad_(trained) for t in (weight, bias)]
    temperature = torch.linspace(0.5, 1.5, len(labels), device="cuda")
    stats = linear_token_stats(
        leaves[0], leaves[1], labels, bias=leaves[2], temperature=temperature, mode=mode, chunk=2048
    )
    weights = torch.arange(len(labels), device="cuda", dtype=torch.float32).sub(10).clamp(min=0)
    gradients = torch.autograd.grad(list(stats), leaves if trained else leaves[:1], [weights] * 3)
    return *stats, *gradients


def run_pair(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    stats = linear_policy_ref_stats(
        leaves[0], leaves[1], hidden, weight * 0.9, labels, bias=leaves[2], softcap=30.0, chunk=2048
    )
    outputs = [stats.logprob, stats.entropy, stats.reverse_kl, stats.forward_kl]
    return *stats, *torch.autograd.grad(outputs, leaves, [torch.ones_like(s) for s in outputs])


RUNS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    **{mode: lambda *given, mode=mode: run_stats(mode, *given) for mode in MODES},
    "pair": run_pair,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_waits(name: str, dtype: torch.dtype, no_waiting: None) -> None:
    """What torch does not multiply into float32, on AMD's GPUs, waits no more."""
    given = inputs(dtype)
    RUNS[name](*given)


@pytest.mark.parametrize("name", RUNS)
def test_is_captured_in_a_graph(name: str) -> None:
    """Replayed on new values in the same memory."""
    given = inputs(torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        RUNS[name](*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = RUNS[name](*given)
    given[0].mul_(0.5)
    given[3].copy_(given[3].flip(0))
    graph.replay()
    for ours, expected in zip(captured, RUNS[name](*given), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode: str) -> None:
    torch.compiler.reset()

    def loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, labels: Tensor) -> Tensor:
        stats = linear_token_stats(hidden * 1, weight, labels, temperature=0.7, mode=mode)
        pair = linear_policy_ref_stats(hidden * 1, weight.detach(), ref_hidden, weight.detach(), labels)
        return (stats.logprob + 0.1 * stats.entropy - stats.lse + pair.reverse_kl).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (20, 30):
        hidden, weight, _, labels = inputs(torch.float32, rows)
        leaves = [hidden.requires_grad_()] + ([] if mode == "frozen" else [weight.requires_grad_()])
        value, expected = (f(hidden, weight, hidden.detach() * 0.9, labels) for f in (compiled, loss))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


def test_loss_equals_statistics() -> None:
    """It waits once for the labelled rows, and once a block for those with a gradient."""
    hidden, weight, bias, labels = inputs(torch.float32)
    weights = torch.linspace(-1, 1, ROWS, device="cuda")
    weights[20:40] = 0
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    budget = 30 * VOCAB * 4
    value = linear_token_loss(
        hidden, weight, labels, lambda s, n: (weights[n] * s.logprob).sum(), bias=bias, memory_budget=budget, chunk=2048
    )
    expected = (weights * linear_token_stats(hidden, weight, labels, bias=bias).logprob).sum()
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(v, leaves) for v in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [65_537])
def test_many_rows(rows: int) -> None:
    hidden, weight, bias, labels = inputs(torch.bfloat16, rows)
    ours, inside = (linear_token_stats(hidden, weight, labels, bias=bias, mode=mode) for mode in ("auto", "fused"))
    pair = linear_policy_ref_stats(hidden, weight, hidden * 0.9, weight, labels, bias=bias, ref_bias=bias)
    last = slice(rows - 7, rows)
    exact = linear_token_stats_reference(hidden[last].double(), weight.double(), labels[last], bias=bias.double())
    exact_pair = linear_policy_ref_stats_reference(
        hidden[last].double(),
        weight.double(),
        (hidden[last] * 0.9).double(),
        weight.double(),
        labels[last],
        bias=bias.double(),
        ref_bias=bias.double(),
    )
    for result, truth in ((ours, exact), (inside, exact), (pair, exact_pair)):
        for statistic, right in zip(result, truth, strict=True):
            torch.testing.assert_close(statistic[last].double(), right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_the_same_bits(name: str) -> None:
    given = inputs(torch.bfloat16)
    first = RUNS[name](*given)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(RUNS[name](*given), first, strict=True))


def test_peak_memory_is_the_plan_s() -> None:
    """32768 rows of Qwen3-8B's head, trained: at most 768 MiB above inputs and gradients."""
    rows, depth, vocab = 32768, 4096, 151936
    hidden = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, depth, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    labels = torch.randint(vocab, (rows,), device="cuda")

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_token_stats(hidden, weight, labels).logprob.sum(), [hidden, weight])

    run()  # what libraries allocate once and for all
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = run()
    peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    sizes = Sizes.of(hidden, vocab, rows)
    plans = plan_forward(sizes, "recompute"), plan_backward(sizes, "recompute", (True, True, False), masked=True)
    assert peak <= max(plan.nbytes for plan in plans) + (8 << 20)  # statistics and their gradients
    assert peak <= 768 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_add_to_float32_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the product where torch lets it, and by a buffer."""
    torch.manual_seed(0)
    a, b = torch.randn(70, 90, device="cuda", dtype=dtype), torch.randn(90, 50, device="cuda", dtype=dtype)
    before = torch.randn(70, 50, device="cuda")
    exact = before.double() + a.double() @ b.double()
    for adds in (adds_in_place(a), False):
        monkeypatch.setattr(_product, "adds_in_place", lambda operand, adds=adds: adds)
        for sums in (None, torch.empty(5000, device="cuda")):
            out = _product.product(a, b, before.clone(), accumulate=True, sums=sums)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("depth", "vocab"), [(768, 50304), (1024, 8000), (4096, 20000), (777, 5003)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_inside_in_every_entry_of_the_table(dtype: torch.dtype, depth: int, vocab: int) -> None:
    """A shallow and a deep head, a narrow vocabulary, rows that begin anywhere; and the same bits in every batch."""
    torch.manual_seed(0)
    hidden = (torch.randn(700, depth, device="cuda") * (3 / depth**0.5)).to(dtype)
    weight = torch.randn(vocab, depth, device="cuda").to(dtype)
    labels = torch.randint(vocab, (700,), device="cuda")
    labels[128:320] = -100
    ours = linear_token_stats(hidden, weight, labels, mode="fused")
    exact = linear_token_stats_reference(hidden.double(), weight.double(), labels)
    for statistic, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(statistic.double(), right, rtol=2e-5, atol=2e-5)
    part = linear_token_stats(hidden[320:329].clone(), weight, labels[320:329], mode="fused")
    for statistic, whole in zip(part, ours, strict=True):
        assert torch.equal(statistic, whole[320:329])
