"""roc_auc against a double loop, ties included; repetition by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.eval.text import repetition, roc_auc

# Few distinct values, so that ties are the rule; infinities have a rank as well.
SCORES = st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0, torch.inf]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(positive=SCORES, negative=SCORES)
def test_auc_is_the_share_of_won_pairs(positive: list[float], negative: list[float]) -> None:
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    got = roc_auc(torch.tensor(positive), torch.tensor(negative))
    assert got == pytest.approx(won / (len(positive) * len(negative)), abs=1e-12)
    assert roc_auc(torch.tensor(negative), torch.tensor(positive)) == pytest.approx(1 - got, abs=1e-12)


def test_auc_of_apart_equal_and_many() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert roc_auc(high, low) == 1.0
    assert roc_auc(low, high) == 0.0
    assert roc_auc(low, low) == 0.5
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    assert roc_auc(*many) == pytest.approx(0.5, abs=0.005)
    assert roc_auc(many[0] + 1, many[1]) == pytest.approx(0.7602, abs=0.005)  # Phi(1 / sqrt 2)


def test_auc_keeps_differences_that_float32_sums_would_lose() -> None:
    base = torch.tensor([1.0], dtype=torch.float64)
    assert roc_auc(base + 1e-12, base) == 1.0


def test_auc_refuses_what_has_no_rank() -> None:
    with pytest.raises(ValueError, match="0 positive and 2 negative scores: at least 1 of each"):
        roc_auc(torch.zeros(0), torch.zeros(2))
    with pytest.raises(ValueError, match="2 positive and 0 negative scores"):
        roc_auc(torch.zeros(2), torch.zeros(0))
    with pytest.raises(ValueError, match=r"scores\[2\] is NaN: it has no rank"):
        roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([torch.nan]))


@pytest.mark.parametrize(
    ("tokens", "order", "expected"),
    [
        ([], 4, 0.0),
        ([1, 2, 3], 4, 0.0),  # shorter than one 4-gram
        ([1, 2, 3, 4], 4, 0.0),
        ([1, 2, 3, 4, 5, 6], 4, 0.0),
        ([1, 1, 1, 1, 1], 4, 1 / 2),  # 2 grams, 1 distinct
        ([1, 1, 1, 1, 1, 1, 1, 1], 4, 4 / 5),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 1, 2], 2, 1 / 3),  # 12 21 12
        ([1, 2, 1, 2], 1, 1 / 2),
    ],
)
def test_repetition_by_hand(tokens: list[int], order: int, expected: float) -> None:
    assert repetition(tokens, order=order) == pytest.approx(expected)


def test_repetition_counts_4_grams_by_default() -> None:
    assert repetition([1, 1, 1, 1, 1]) == 0.5
