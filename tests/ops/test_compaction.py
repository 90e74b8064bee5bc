"""max_rows: only rows with a label take part, found on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.ops import TokenStats, linear_token_stats
from irlfast.ops._compaction import compaction, over_labelled_rows


def batch(rows: int, ignored: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    labels = torch.randint(2100, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return torch.randn(rows, 8), torch.randn(2100, 8), labels


@settings(deadline=None, max_examples=60)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=40), more=st.integers(-3, 5))
def test_places_and_slots(kept: list[bool], more: int) -> None:
    """Labelled rows in their order, then vacant slots; the first `most` of too many."""
    most = max(0, sum(kept) + more)
    labels = torch.tensor([7 if keep else -1 for keep in kept])
    places, vacant, slots = compaction(labels, -1, most)
    rows = [row for row, keep in enumerate(kept) if keep]
    assert places.tolist() == (rows + [0] * most)[:most]
    assert vacant.tolist() == [slot >= len(rows) for slot in range(most)]
    for row, slot in enumerate(slots.tolist()):
        number = rows.index(row) if kept[row] else None
        assert slot == (most if number is None else number if number < most else most + 1)


@pytest.mark.parametrize("mode", ["recompute", "keep", "frozen"])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("shape", [(30,), (5, 6)], ids=str)
def test_as_without_it(shape: tuple[int, ...], spare: int, mode: str) -> None:
    """Statistics and gradients, one temperature a row; NaN in ignored rows reaches nothing, the first among them."""
    hidden, weight, labels = batch(30)
    labels[0] = -100
    hidden[labels == -100] = torch.nan
    upstream = torch.randn(3, *shape)
    temperature = torch.linspace(0.5, 1.5, 30).view(shape)
    runs = []
    for most in (None, int((labels != -100).sum()) + spare):
        leaves = [hidden.view(*shape, 8).clone().requires_grad_(), weight.clone().requires_grad_(mode != "frozen")]
        stats = linear_token_stats(
            *leaves,
            labels.view(shape),
            temperature=temperature,
            mode=mode,
            max_rows=most,  # type: ignore[arg-type]
        )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        runs.append([*stats, *torch.autograd.grad(stats, wanted, list(upstream))])
    for value, expected in zip(*runs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_bounds() -> None:
    hidden, weight, labels = batch(12)
    count = int((labels != -100).sum())
    with pytest.raises(ValueError, match=f"{count} rows have a label, and max_rows = {count - 1}"):
        linear_token_stats(hidden, weight, labels, max_rows=count - 1)
    with pytest.raises(ValueError, match="max_rows = -1 is negative"):
        linear_token_stats(hidden, weight, labels, max_rows=-1)
    with pytest.raises(ValueError, match=r"labels have shape \(11,\), expected \(12,\)"):
        linear_token_stats(hidden, weight, labels[1:], max_rows=3)
    empty = linear_token_stats(hidden[:0], weight, labels[:0], max_rows=4)
    assert empty.logprob.shape == (0,)
    nothing = linear_token_stats(hidden, weight, torch.full((12,), -100), max_rows=0)
    assert torch.equal(nothing.logprob, torch.zeros(12))


class Meta(torch.Tensor):
    """Not a plain tensor, so that nobody counts its labels, as on a GPU."""


def test_rows_beyond_are_nan_where_nobody_counts() -> None:
    labels = torch.tensor([3, -100, 4, 5])
    hidden = torch.arange(8.0).view(4, 2).requires_grad_()

    def run(states: list[Tensor], few: Tensor, temperature: Any) -> TokenStats:
        assert few.tolist() == [3, 4]
        total = states[0].sum(1)
        return TokenStats(total, 2 * total, 3 * total)

    stats = over_labelled_rows("x", run, [hidden], labels.as_subclass(Meta), 1.0, -100, 2)  # type: ignore[arg-type]
    assert torch.equal(stats.logprob[:3], torch.tensor([1.0, 0.0, 9.0]))
    assert bool(stats.entropy[3].isnan())
    (gradient,) = torch.autograd.grad(stats.logprob[:3].sum(), hidden)
    assert torch.equal(gradient, torch.tensor([[1.0, 1.0], [0, 0], [1, 1], [0, 0]]))


def test_nothing_waits_for_a_value() -> None:
    """On tensors without values: whatever asks for one, or makes a shape of one, fails. Nine rows of 64 are left."""
    hidden = torch.empty(64, 8, device="meta", requires_grad=True)
    labels = torch.empty(64, device="meta", dtype=torch.long)

    def run(states: list[Tensor], few: Tensor, temperature: Any) -> TokenStats:
        assert states[0].shape == (9, 8)
        assert few.shape == temperature.shape == (9,)
        return TokenStats(*(states[0].sum(1) for _ in range(3)))

    stats = over_labelled_rows("x", run, [hidden], labels, torch.empty(64, device="meta"), -100, 9)
    assert stats.logprob.shape == (64,)
    assert torch.autograd.grad(stats.logprob.sum(), hidden)[0].shape == (64, 8)
    with pytest.raises(RuntimeError):
        (labels != -100).nonzero().tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    hidden, weight, labels = batch(20)

    def loss(x: Tensor) -> Tensor:
        return linear_token_stats(x, weight, labels, max_rows=20).logprob.sum()

    hidden.requires_grad_()
    value, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden), loss(hidden)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, hidden), torch.autograd.grad(expected, hidden))
