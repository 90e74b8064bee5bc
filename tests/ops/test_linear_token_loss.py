"""ops.linear_token_loss: blocks of rows, gradients made with the loss, agreement with linear_token_stats, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.losses import policy_loss
from irlfast.ops import TokenStats, _linear_plan, linear_token_loss, linear_token_stats
from irlfast.ops._linear_cpu import CpuEpilogue
from irlfast.ops.linear_token_loss import linear_token_loss_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VOCAB = 5003  # two whole chunks and a ragged third
# Bytes of float32 logits for 1, 4, 11 and all rows a block (float64: half as many).
BUDGETS = [0, 4 * VOCAB * 4, 11 * VOCAB * 4, 1 << 30]
SOURCES = ("hidden", "weight", "bias")


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Problem(self.hidden.to(dtype), self.weight.to(dtype), bias, self.labels)


def problem(rows: int = 13, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Logits of standard deviation 3; two rows are ignored, where there are so many."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[[1, 5][: max(0, rows - 5)]] = -100
    return Problem(randn(rows, 16), randn(vocab, 16) * 0.75, randn(vocab), labels).to(dtype)


class TokenTerms:
    """A loss of all three statistics, with a weight and a curvature of its own for each row."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.weights = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1
        self.given: list[Tensor] = []

    def __call__(self, stats: TokenStats, rows: Tensor) -> Tensor:
        self.given.append(rows)
        w = self.weights[:, rows].to(stats.logprob.dtype)
        return (w[0] * stats.logprob + w[1] * stats.entropy.square() + w[2] * (0.1 * stats.lse).tanh()).sum()


class Run(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


def differentiate(
    inputs: Problem,
    loss: Callable[[TokenStats, Tensor], Tensor],
    function: Callable[..., Tensor] = linear_token_loss,
    sources: tuple[str, ...] = SOURCES,
    **options: Any,
) -> Run:
    leaves = {
        name: tensor.detach().requires_grad_(name in sources)
        for name, tensor in inputs._asdict().items()
        if name != "labels" and tensor is not None
    }
    value = function(leaves["hidden"], leaves["weight"], inputs.labels, loss, bias=leaves.get("bias"), **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(value, list(wanted.values()))
    return Run(value.detach(), dict(zip(wanted, gradients, strict=True)))


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).abs().max()) if result.numel() else 0.0


def assert_close_to_exact(result: Run, inputs: Problem, loss: TokenTerms, **options: Any) -> None:
    """Gradients as good as plain torch's in the same type, the loss as good as from float32 logits."""
    options = {k: v for k, v in options.items() if k not in ("memory_budget", "chunk", "impl")}
    wide = inputs.hidden.dtype == torch.float64
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = differentiate(inputs.to(torch.float64), loss, linear_token_loss_reference, **double)
    plain = differentiate(inputs, loss, linear_token_loss_reference, **options)
    tolerance = 1e-11 if wide else 1e-5
    scale = float(loss.weights.abs().sum())
    assert result.loss.dtype == (torch.float64 if wide else torch.float32)
    assert error(result.loss, exact.loss) <= error(plain.loss, exact.loss) + tolerance * scale
    # The logits' gradient is rounded where bfloat16 is multiplied as such, as it is in eager.
    rounding = 1e-2 if inputs.hidden.dtype == torch.bfloat16 else 0.0
    for name, truth in exact.gradients.items():
        value = result.gradients[name]
        assert value.dtype == inputs.hidden.dtype
        assert value.shape == truth.shape
        assert error(value, truth) <= error(plain.gradients[name], truth) + max(tolerance, rounding), name


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, budget: int, bias: bool, softcap: float | None) -> None:
    inputs = problem(dtype=dtype)
    inputs = inputs if bias else inputs._replace(bias=None)
    loss = TokenTerms(13)
    options = {"temperature": torch.linspace(0.5, 1.5, 13), "softcap": softcap, "memory_budget": budget}
    result = differentiate(inputs, loss, impl="cpu", **options)
    block = max(1, budget // (VOCAB * (8 if dtype == torch.float64 else 4)))
    assert [len(rows) for rows in loss.given] == [min(block, 11 - begin) for begin in range(0, 11, block)]
    assert torch.equal(torch.cat(loss.given), (inputs.labels != -100).nonzero().squeeze(1))
    assert_close_to_exact(result, inputs, loss, **options)


@pytest.mark.parametrize("vocab", [1, 5, 2047, 2048, 2049, 4096])  # around one chunk, and two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_boundary_of_chunks(dtype: torch.dtype, vocab: int) -> None:
    inputs, loss = problem(7, vocab, dtype), TokenTerms(7)
    for options in ({"chunk": 4096}, {"memory_budget": 3 * vocab * 4}):
        assert_close_to_exact(
            differentiate(inputs, loss, impl="cpu", temperature=0.7, **options), inputs, loss, temperature=0.7
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_inside_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 3 rows inside blocks of 7, the last of them ragged."""
    monkeypatch.setattr(_linear_plan, "SCRATCH_BYTES", 3 * 2048 * 4)
    inputs, loss = problem(20, dtype=dtype), TokenTerms(20)
    assert_close_to_exact(differentiate(inputs, loss, memory_budget=7 * VOCAB * 4), inputs, loss)


def test_equals_linear_token_stats() -> None:
    inputs, loss = problem(), TokenTerms(13)

    def by_statistics(hidden: Tensor, weight: Tensor, labels: Tensor, loss: TokenTerms, bias: Tensor) -> Tensor:
        return loss(linear_token_stats(hidden, weight, labels, bias=bias, mode="keep"), torch.arange(13))

    expected = differentiate(inputs, loss, by_statistics)
    # Ignored rows, of statistics 0, are never given to the loss, which is 0 there.
    result = differentiate(inputs, loss, impl="cpu")
    torch.testing.assert_close(result.loss, expected.loss)
    for name in SOURCES:
        torch.testing.assert_close(result.gradients[name], expected.gradients[name])


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 12),
    vocab=st.integers(1, 5000),
    block=st.integers(0, 13),
    pieces=st.integers(1, 4),
)
def test_blocks_do_not_matter(seed: int, rows: int, vocab: int, block: int, pieces: int) -> None:
    inputs, loss = problem(rows, vocab, torch.float64, seed), TokenTerms(rows, seed)
    whole = differentiate(inputs, loss, impl="cpu")
    cut = differentiate(inputs, loss, impl="cpu", memory_budget=block * vocab * 8, chunk=pieces * 2048)
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-12, atol=1e-12)
    for name in SOURCES:
        torch.testing.assert_close(cut.gradients[name], whole.gradients[name], rtol=1e-11, atol=1e-11)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_for_any_block_chunk_and_thread_count(threads: Callable[[int], None]) -> None:
    """Products of one term each, so that no order of additions can show in them."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.diag(torch.randint(1, 4, (9,), generator=generator).float())
    weight = torch.zeros(VOCAB, 9)
    weight[torch.randint(VOCAB, (9,), generator=generator), torch.arange(9)] = 2.0
    bias = torch.randint(-8, 9, (VOCAB,), generator=generator).float()
    inputs = Problem(hidden, weight, bias, torch.randint(VOCAB, (9,), generator=generator))
    loss = TokenTerms(9)
    threads(1)
    expected = differentiate(inputs, loss, sources=("hidden", "weight"))
    for count in (1, 2, 3):
        threads(count)
        for budget in (0, 4 * VOCAB * 4, 1 << 30):
            for chunk in (2048, 4096, 1 << 20):
                result = differentiate(inputs, loss, sources=("hidden", "weight"), memory_budget=budget, chunk=chunk)
                for name, gradient in result.gradients.items():
                    assert torch.equal(gradient, expected.gradients[name]), (name, count, budget, chunk)


def ppo_inputs() -> tuple[Problem, dict[str, Tensor]]:
    """Four responses of up to five tokens, as many of whose ratios are clipped as not."""
    inputs = problem(20)._replace(bias=None)
    generator = torch.Generator().manual_seed(4)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    labels = torch.randint(VOCAB, (4, 5), generator=generator).masked_fill(~mask, -100)
    inputs = inputs._replace(hidden=inputs.hidden.view(4, 5, 16), labels=labels)
    with torch.no_grad():
        logprobs = linear_token_stats(inputs.hidden, inputs.weight, labels).logprob
    noise = 0.4 * torch.randn(4, 5, generator=generator)
    return inputs, {
        "advantages": torch.randn(4, 5, generator=generator),
        "mask": mask,
        "old_logprobs": logprobs + noise,
    }


@pytest.mark.parametrize("budget", BUDGETS)
def test_clipped_policy_gradient_equals_policy_loss(budget: int) -> None:
    inputs, terms = ppo_inputs()
    count = int(terms["mask"].sum())
    advantages, old = terms["advantages"].flatten(), terms["old_logprobs"].flatten()

    def clipped(stats: TokenStats, rows: Tensor) -> Tensor:
        ratio = (stats.logprob - old[rows]).exp()
        a = advantages[rows]
        return -(torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + 0.01 * stats.entropy).sum() / count

    def by_statistics(hidden: Tensor, weight: Tensor, labels: Tensor, loss: object, bias: None) -> Tensor:
        stats = linear_token_stats(hidden, weight, labels)
        return policy_loss(
            stats.logprob, kind="ppo", clip=(0.2, 0.2), entropy=stats.entropy, entropy_coef=0.01, **terms
        ).loss

    expected = differentiate(inputs, clipped, by_statistics, ("hidden", "weight"))
    result = differentiate(inputs, clipped, sources=("hidden", "weight"), memory_budget=budget)
    torch.testing.assert_close(result.loss, expected.loss)
    for name in ("hidden", "weight"):
        assert result.gradients[name].shape == getattr(inputs, name).shape
        torch.testing.assert_close(result.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_is_the_slope(seed: int) -> None:
    """Central differences along a random direction; gradcheck would run backward again and again."""
    inputs, loss = problem(7, 2100, torch.float64, seed), TokenTerms(7, seed)
    options: dict[str, Any] = {"softcap": 4.0, "memory_budget": 3 * 2100 * 8, "impl": "cpu"}
    gradients = differentiate(inputs, loss, **options).gradients
    generator = torch.Generator().manual_seed(seed)
    direction = {k: torch.randn(g.shape, generator=generator, dtype=torch.float64) for k, g in gradients.items()}
    step = 1e-5

    def at(distance: float) -> float:
        moved = {k: getattr(inputs, k) + distance * d for k, d in direction.items()}
        hidden, weight, bias = (moved[k] for k in SOURCES)
        return float(linear_token_loss(hidden, weight, inputs.labels, loss, bias=bias, **options))

    slope = sum(float((gradients[k] * d).sum()) for k, d in direction.items())
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-7, abs=1e-6)


def test_upstream_gradient_scales() -> None:
    hidden, weight, _, labels = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = TokenTerms(13)
    plain = torch.autograd.grad(linear_token_loss(hidden, weight, labels, loss), (hidden, weight))
    scaled = torch.autograd.grad(linear_token_loss(hidden, weight, labels, loss) * -2, (hidden, weight))
    assert all(torch.equal(b, a * -2) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_gradient_reaches_what_made_the_inputs(budget: int) -> None:
    """Through a layer below and a head that is another's parameter, into .grad that holds something."""
    torch.manual_seed(5)
    body, head = torch.nn.Linear(6, 16), torch.nn.Linear(16, 2100)
    features, labels = torch.randn(2, 3, 6), torch.randint(2100, (2, 3))
    grads = []
    for function in (linear_token_loss, linear_token_loss_reference):
        parameters = [*body.parameters(), *head.parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        options = {"memory_budget": budget} if function is linear_token_loss else {}
        function(body(features), head.weight, labels, TokenTerms(6), bias=head.bias, **options).backward()
        grads.append([p.grad for p in parameters])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_one_source_alone(source: str) -> None:
    inputs, loss = problem(), TokenTerms(13)
    result = differentiate(inputs, loss, sources=(source,), memory_budget=4 * VOCAB * 4)
    together = differentiate(inputs, loss, memory_budget=4 * VOCAB * 4)
    assert torch.equal(result.gradients[source], together.gradients[source])


def test_without_grad_only_the_value() -> None:
    hidden, weight, bias, labels = problem()
    loss = TokenTerms(13)
    expected = differentiate(Problem(hidden, weight, bias, labels), loss).loss
    with torch.no_grad():
        value = linear_token_loss(hidden.requires_grad_(), weight, labels, loss, bias=bias)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    assert not linear_token_loss(hidden.detach(), weight, labels, loss, bias=bias).requires_grad


def test_rows_without_gradient_enter_no_product() -> None:
    """Their hidden states are NaN, and the loss leaves them out."""
    inputs, loss = problem(), TokenTerms(13)
    poisoned = [0, 3, 12]
    loss.weights[:, poisoned] = 0
    expected = differentiate(inputs, loss, memory_budget=4 * VOCAB * 4)
    inputs.hidden[poisoned] = math.nan

    def kept(stats: TokenStats, rows: Tensor) -> Tensor:
        keep = ~torch.isin(rows, torch.tensor(poisoned))
        return loss(TokenStats(*(s[keep] for s in stats)), rows[keep])

    result = differentiate(inputs, kept, memory_budget=4 * VOCAB * 4)
    assert torch.equal(result.loss, expected.loss)
    for name in SOURCES:
        assert torch.equal(result.gradients[name], expected.gradients[name]), name
    assert torch.equal(result.gradients["hidden"][poisoned], torch.zeros(3, 16))


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_loss_without_a_gradient(budget: int) -> None:
    """A constant, and one that depends on something else: nothing flows back, not even a NaN."""
    inputs = problem()
    inputs.hidden[0] = math.nan
    other = torch.ones((), requires_grad=True)
    for loss in (lambda stats, rows: torch.tensor(2.0), lambda stats, rows: other * 2.0):
        result = differentiate(inputs, loss, memory_budget=budget)
        assert float(result.loss) == (2.0 if budget else 22.0)
        for name, gradient in result.gradients.items():
            assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name))), name


@pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.long), torch.full((2, 3), -100)])
def test_no_row_with_a_label(labels: Tensor) -> None:
    inputs = problem(6)._replace(labels=labels, hidden=torch.full((*labels.shape, 16), math.nan))
    loss = TokenTerms(6)
    result = differentiate(inputs, loss)
    assert loss.given == []
    assert float(result.loss) == 0.0
    for name, gradient in result.gradients.items():
        assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name))), name


def test_autocast() -> None:
    inputs, loss = problem(), TokenTerms(13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = differentiate(inputs, loss)
    rounded = differentiate(inputs.to(torch.bfloat16), loss)
    assert torch.equal(result.loss, rounded.loss)
    for name, gradient in result.gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, rounded.gradients[name].float(), rtol=1e-2, atol=1e-2)


def test_second_backward_is_refused() -> None:
    hidden, weight, _, labels = problem()
    value = linear_token_loss(hidden.requires_grad_(), weight, labels, TokenTerms(13))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_loss: backward ran before"):
        value.backward()


def test_second_derivative_is_refused() -> None:
    hidden, weight, _, labels = problem()
    value = linear_token_loss(hidden.requires_grad_(), weight, labels, TokenTerms(13))
    with pytest.raises(RuntimeError, match="linear_token_loss has no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)
    assert torch.autograd.grad(value, hidden)[0].isfinite().all()  # the refusal used nothing up


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (lambda stats, rows: stats.logprob, r"\(11,\)"),
        (lambda stats, rows: stats.logprob.sum().view(1), r"\(1,\)"),
        (lambda stats, rows: 0.0, "float"),
        (lambda stats, rows: None, "NoneType"),
    ],
)
def test_loss_that_is_no_sum_is_refused(loss: Any, given: str) -> None:
    hidden, weight, _, labels = problem()
    message = f"linear_token_loss: loss gave {given}, expected a 0-d tensor, the sum of the terms of 11 rows"
    with pytest.raises(ValueError, match=message):
        linear_token_loss(hidden, weight, labels, loss)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"labels": torch.tensor([[0, 9, 1]])}, IndexError, r"labels\[0, 1\] = 9 is outside \[0, 5\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature of row 1 = 0.0"),
        ({"temperature": -1.0}, ValueError, "linear_token_loss: temperature = -1.0"),
        ({"softcap": 0.0}, ValueError, "linear_token_loss: softcap = 0.0"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"linear_token_loss: weight has shape \(5, 3\)"),
        ({"bias": torch.zeros(5).half()}, TypeError, "linear_token_loss: bias is torch.float16"),
        ({"memory_budget": -1}, ValueError, "linear_token_loss: memory_budget = -1 is negative"),
        ({"chunk": 0}, ValueError, "linear_token_loss: chunk = 0"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], exception: type[Exception], message: str, impl: str
) -> None:
    defaults: dict[str, Any] = {"hidden": torch.zeros(1, 3, 4), "weight": torch.zeros(5, 4)}
    defaults |= {"labels": torch.zeros(1, 3, dtype=torch.long), "loss": lambda stats, rows: stats.logprob.sum()}
    with pytest.raises(exception, match=message):
        linear_token_loss(**{**defaults, **arguments}, impl=impl)


def test_unavailable_implementations_say_why() -> None:
    hidden, weight, _, labels = problem()
    with pytest.raises(RuntimeError, match="linear_token_loss: impl='cuda' is not available"):
        linear_token_loss(hidden, weight, labels, TokenTerms(13), impl="cuda")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # it reads the result's after the break
def test_compiled_callers_leave_it_alone() -> None:
    """A graph break: what surrounds the call is compiled, the call itself runs as it is, with its gradients."""
    torch.compiler.reset()
    inputs, loss = problem(), TokenTerms(13)
    hidden, weight, _, labels = inputs
    compiling: list[bool] = []

    def watched(stats: TokenStats, rows: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return loss(stats, rows)

    def step(hidden: Tensor) -> Tensor:
        return linear_token_loss(hidden * 2, weight, labels, watched) * 3

    leaf = hidden.requires_grad_()
    value = torch.compile(step, backend="aot_eager")(leaf)
    expected = step(leaf)
    assert compiling == [False, False]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(expected, leaf))


def test_importing_the_ops_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Which takes seconds."""
    code = "import sys, irlfast.ops; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


class ForgetsTheLabel(CpuEpilogue):
    """Differentiates as if no row had its label in these columns."""

    def differentiate(self, logits: Tensor, first_column: int, rows: Any, *rest: Any, **options: Any) -> None:
        super().differentiate(
            logits, first_column, rows._replace(labels=torch.full_like(rows.labels, 1 << 40)), *rest, **options
        )


def test_a_broken_epilogue_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, loss = problem(), TokenTerms(13)
    assert_close_to_exact(differentiate(inputs, loss), inputs, loss)
    monkeypatch.setattr(sys.modules["irlfast.ops.linear_token_loss"], "CpuEpilogue", ForgetsTheLabel)
    with pytest.raises(AssertionError, match="hidden"):
        assert_close_to_exact(differentiate(inputs, loss), inputs, loss)


def test_a_mean_over_the_given_rows_is_noticed() -> None:
    """What the docstring forbids shows as soon as there are several blocks."""
    inputs = problem()
    losses = [
        differentiate(inputs, lambda stats, rows: stats.logprob.mean(), memory_budget=budget).loss for budget in BUDGETS
    ]
    assert float(losses[-1]) != pytest.approx(float(losses[0]), rel=0.5)
