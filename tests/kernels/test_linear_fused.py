"""The kernel of linear_token_stats with products inside: what is its own. What it computes is in
test_linear_token_stats.py, among the modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import PIECE, problem
from torch import Tensor
from triton_cases import error, random_logits, shifted_logits
from triton_mutation import assert_noticed
from triton_traffic import count_traffic

from irlfast.ops import TokenStats, linear_token_stats
from irlfast.ops import _linear_fused_triton as fused
from irlfast.ops.linear_token_stats import linear_token_stats_reference, resolve_mode

VOCAB = PIECE + 104


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu", in the interpreter with small tiles, or "cuda"."""
    if request.param == "cpu":
        request.getfixturevalue("small_tiles")
    return str(request.param)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> TokenStats:
    return linear_token_stats(hidden, weight, labels, impl="triton", mode="fused", **options)


def check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any) -> None:
    """No worse than from float32 logits, nearly."""
    stats = ours(hidden, weight, labels, bias=bias, **options)
    given = [t.detach().cpu() for t in (hidden, weight)]
    of_bias = None if bias is None else bias.cpu()
    wide = {"bias": None if of_bias is None else of_bias.double(), **options}
    exact = linear_token_stats_reference(*(t.double() for t in given), labels.cpu(), **wide)
    plain = linear_token_stats_reference(*given, labels.cpu(), bias=of_bias, **options)
    for name in TokenStats._fields:
        truth = getattr(exact, name)
        assert error(getattr(stats, name), truth) <= error(getattr(plain, name), truth) + 1e-5, name


def random_problem(rows: int, depth: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(depth)
    hidden = (torch.randn(rows, depth) * (3 / depth**0.5)).to(device, dtype)
    weight = torch.randn(vocab, depth).to(device, dtype)
    return hidden, weight, torch.randint(vocab, (rows,), device=device)


# Less than a block, one, and a ragged third; rows that begin at 16 bytes, and that do not.
@pytest.mark.parametrize("depth", [1, 8, 20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_depth_ends_within_a_block(device: str, dtype: torch.dtype, depth: int) -> None:
    check(*random_problem(5, depth, 700, dtype, device))


@pytest.mark.interpreter
def test_both_ways_to_load_a_tile_give_the_same_bits(small_tiles: None) -> None:
    hidden, weight, labels = random_problem(5, 20, VOCAB, torch.float32, "cpu")
    entry = fused.config_for(hidden, weight)
    assert entry.descriptors
    runs = [
        fused.forward_fused(hidden, weight, None, labels, None, 0.7, 0.0, -100, config=entry._replace(descriptors=way))
        for way in (False, True)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rows apart": lambda x, w: (x.repeat(1, 2)[:, :20], w.repeat(1, 3)[:, 20:40]),
    "no multiple of 16 bytes": lambda x, w: (x.repeat(1, 2)[:, 1:21], w.repeat(1, 2)[:, 3:23]),
    "one row for all": lambda x, w: (x[:1].expand(5, 20), w),
    "columns adjacent": lambda x, w: (x.t().contiguous().t(), w.t().contiguous().t()),
}


def test_autocast_casts_the_operands(device: str) -> None:
    hidden, weight, labels = random_problem(3, 8, 70, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        stats = ours(hidden, weight, labels)
    for mine, right in zip(stats, ours(hidden.bfloat16(), weight.bfloat16(), labels), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, right)


def check_strides(layout: str, device: str) -> None:
    hidden, weight, labels = random_problem(5, 20, 700, torch.float32, device)
    check(*LAYOUTS[layout](hidden, weight), labels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device: str, layout: str) -> None:
    check_strides(layout, device)


def assert_same_bits_in_every_batch(device: str) -> None:
    """Three tiles a part: of two the sum is the same in either order."""
    hidden, weight, labels = random_problem(9, 8, 3 * PIECE + 1, torch.float32, device)
    temperature = torch.linspace(0.5, 1.5, 9, device=device)
    whole = ours(hidden, weight, labels, temperature=temperature)
    for rows in (torch.tensor([4]), torch.tensor([3, 4, 5]), torch.arange(9).flip(0)):
        which = rows.to(device)
        part = ours(hidden[which], weight, labels[which], temperature=temperature[which])
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[which], b)


def test_a_row_has_the_same_bits_in_every_batch(device: str) -> None:
    """One row, three, in another order: other tiles and other places in them."""
    assert_same_bits_in_every_batch(device)


def test_no_tile_for_a_part(device: str) -> None:
    """A vocabulary of one tile leaves all parts but one without."""
    check(*random_problem(3, 8, 33, torch.float32, device))


def matches_float64(make: Callable[[int, int], Tensor]) -> None:
    inputs = problem(make, VOCAB)
    inputs.hidden[:, 5:] = 0  # around 150 each sum of a product is rounded by 8e-6
    check(inputs.hidden, inputs.weight, inputs.labels, inputs.bias)


def count_reads_and_writes() -> None:
    hidden, weight, labels = random_problem(12, 24, VOCAB, torch.float32, "cpu")
    labels[4:8] = -100
    labels[0] = -100  # in a tile of others, which is multiplied
    entry = fused.config_for(hidden, weight)._replace(descriptors=False)
    with count_traffic() as traffic:
        outputs = fused.forward_fused(hidden, weight, None, labels, None, 1.0, 0.0, -100, config=entry)
    tiles = math.ceil(VOCAB / entry.vocab)
    assert traffic.launches == 2
    assert traffic.read(hidden) == 2 * entry.rows * 24 * 4 * tiles
    assert traffic.read(weight) == 2 * tiles * entry.vocab * 24 * 4  # the last row for those that the last tile lacks
    results = sum(output.numel() for output in outputs)
    assert traffic.written_in_all() == 4 * (results + 4 * entry.splits * 12)


@pytest.mark.interpreter
def test_reads_operands_tile_by_tile_and_writes_no_logits(small_tiles: None) -> None:
    """Four rows a tile, of three tiles the second ignored: of that nothing is read. Two launches."""
    count_reads_and_writes()


def read_ragged_operands() -> None:
    hidden, weight, labels = random_problem(5, 23, 700, torch.float16, "cpu")
    labels[1:3] = torch.tensor([2**40, -(2**40)])
    both = torch.cat([weight, hidden])  # so that each is within the storage that is allowed
    entry = fused.config_for(both[700:], both[:700])
    assert not entry.descriptors
    with count_traffic(allowed=both):
        logprob, *_ = fused.forward_fused(both[700:], both[:700], None, labels, None, 1.0, 0.0, -100, config=entry)
    assert logprob.isnan().tolist() == [False, True, True, False, False]


@pytest.mark.interpreter
def test_nothing_outside_the_operands_is_read(small_tiles: None) -> None:
    """Ragged rows, vocabulary and depth; labels far outside."""
    read_ragged_operands()


def test_auto_never_takes_it() -> None:
    """Until it has been measured."""
    hidden, weight = torch.zeros(2, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    for x in (hidden, hidden.detach()):
        for w in (weight, weight.detach()):
            for budget in (0, 1 << 30):
                assert resolve_mode("auto", x, w, None, 2, budget) != "fused"


# What is broken, how, and the test that has to notice.
BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "a maximum of 0 before the first": (
        "_linear_fused",
        'max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)',
        "max = tl.zeros([BLOCK_ROWS], tl.float32)",
        lambda: matches_float64(shifted_logits),
    ),
    "no mask beyond the vocabulary": (
        "_linear_fused",
        'tl.where(columns[None, :] < vocab, logits, float("-inf"))',
        "logits",
        lambda: matches_float64(random_logits),
    ),
    "no mask beyond the depth": (
        "_linear_fused",
        "mask=columns[None, :] < depth, other=0.0",
        "mask=columns[None, :] < depth + 8, other=0.0",
        lambda: check_strides("no multiple of 16 bytes", "cpu"),
    ),
    "rows beyond the last are read": (
        "_linear_fused",
        "tl.minimum(first + tl.arange(0, ROWS), count - 1)",
        "(first + tl.arange(0, ROWS))",
        read_ragged_operands,
    ),
    "an entropy without lse": (
        "_online_softmax",
        "return online_softmax_log_sum(max, others) - LN_2",
        "return -LN_2",
        lambda: matches_float64(random_logits),
    ),
    "a tile belongs to two parts": (
        "_linear_fused",
        "end = (split + 1) * tiles // splits",
        "end = (split + 1) * tiles // splits + 1",
        lambda: matches_float64(random_logits),
    ),
    "the label of another half": (
        "_linear_fused",
        "right, first + HALF",
        "right, first",
        lambda: matches_float64(random_logits),
    ),
    "the order of tiles depends on the number of rows": (
        "_linear_fused",
        "first = tile * BLOCK_VOCAB",
        "first = (begin + (tile - begin + row_tiles) % (end - begin)) * BLOCK_VOCAB",
        lambda: assert_same_bits_in_every_batch("cpu"),
    ),
    "a tile of ignored rows is multiplied": (
        "_linear_fused",
        "tl.where(wanted, end, begin)",
        "end",
        count_reads_and_writes,
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str, small_tiles: None) -> None:
    assert_noticed(*BREAKS[what])
