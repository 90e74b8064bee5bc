"""Rankings against definitions, exhaustive search and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.eval.ranking import (
    best_f1_threshold,
    bootstrap_mean,
    correlations,
    f1_score,
    pair_wins,
    reward_distance,
)

# Few distinct values, so that ties are the rule.
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), min_size=2, max_size=12)


def test_wins_count_ties_half_and_ignore_any_threshold() -> None:
    assert pair_wins([3.0, 1.0, -5.0, 2.0], [2.0, 1.0, -7.0, 4.0]).tolist() == [1.0, 0.5, 1.0, 0.0]


def test_infinite_scores_have_a_rank() -> None:
    assert pair_wins([np.inf, np.inf, -np.inf], [1.0, np.inf, 0.0]).tolist() == [1.0, 0.5, 0.0]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), scores=SCORES)
def test_threshold_is_as_good_as_any(data: st.DataObject, scores: list[float]) -> None:
    labels = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(scores), max_size=len(scores)))
    if len(set(labels)) < 2:
        return
    best = f1_score(scores, labels, best_f1_threshold(scores, labels))
    assert best == max(f1_score(scores, labels, t) for t in [*scores, np.inf])


def test_f1_by_hand() -> None:
    assert f1_score([1, 2, 3, 4], [0, 1, 0, 1], 2) == pytest.approx(2 * 2 / (3 + 2))
    assert f1_score([1, 2], [0, 1], 5) == 0.0


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_mean(generator.normal(size=60), draws=400, seed=trial)[1:]
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_bootstrap_of_clusters_is_wider_where_rows_repeat() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=30), 20)
    alone = bootstrap_mean(values)
    together = bootstrap_mean(values, clusters=[i // 20 for i in range(600)])
    assert alone.value == together.value == pytest.approx(values.mean())
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)


def test_correlations_of_a_monotone_curve() -> None:
    x = np.linspace(0, 3, 20)
    curve = correlations(x, np.exp(3 * x))
    assert curve.spearman == pytest.approx(1)
    assert curve.kendall == pytest.approx(1)
    assert 0.5 < curve.pearson < 0.9
    assert correlations(x, -x) == pytest.approx((-1, -1, -1))
    assert np.isnan(correlations(x, np.ones(20))).all()


@settings(deadline=None, max_examples=100)
@given(scores=st.lists(st.floats(-5, 5), min_size=6, max_size=6), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_distance_ignores_scale_and_a_shift_by_prompt(scores: list[float], scale: float, shift: float) -> None:
    groups = [0, 0, 0, 1, 1, 1]
    rewards = np.asarray(scores) + np.arange(6) ** 2
    same = scale * rewards + np.asarray([shift] * 3 + [-2 * shift] * 3)
    assert reward_distance(rewards, same, groups=groups) == pytest.approx(0, abs=1e-5)
    assert reward_distance(rewards, -same, groups=groups) == pytest.approx(1, abs=1e-5)


def test_distance_of_unrelated_rewards_and_of_a_shift_that_counts() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 20_000))
    assert reward_distance(a, b) == pytest.approx(np.sqrt(0.5), abs=0.01)
    shifted = a + np.repeat([0.0, 10.0], 10_000)
    assert reward_distance(a, shifted) > 0.5
    assert reward_distance(a, shifted, groups=[i // 10_000 for i in range(20_000)]) == pytest.approx(0, abs=1e-6)
    assert np.isnan(reward_distance(np.ones(4), np.arange(4.0)))


def test_distance_obeys_the_triangle_inequality() -> None:
    for a, b, c in np.random.default_rng(3).normal(size=(50, 3, 8)):
        assert reward_distance(a, c) <= reward_distance(a, b) + reward_distance(b, c) + 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_wins([], []), "chosen has shape"),
        (lambda: pair_wins([1.0], [1.0, 2.0]), "rejected has shape"),
        (lambda: pair_wins([float("nan")], [1.0]), r"chosen\[0\] is NaN"),
        (lambda: best_f1_threshold([1.0, 2.0], [1, 1]), "expected both 0 and 1"),
        (lambda: correlations([1.0], [1.0]), "needs at least 2"),
        (lambda: reward_distance([1.0, 2.0], [1.0, 2.0], groups=[0]), "1 groups for 2 rewards"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=[0]), "1 clusters for 2 values"),
    ],
)
def test_what_cannot_be_ranked_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
