"""One pass: wrong contenders are refused, ratios are those of paired rounds, memory is what a run needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench._case import OURS, Bar, Contender, Family, Pass, Truth
from bench._harness import LEAST_ROUNDS, Plan, Settings, WrongResult, check, measure_pass, paired_ratio, peak_mib

X = torch.linspace(-1, 1, 64)


def contender(name: str, family: Family, function: Callable[[], Tensor]) -> Contender:
    return Contender(name=name, family=family, run=lambda: (function(),))


def work(*contenders: Contender, bars: tuple[Bar, ...] = ()) -> Pass:
    mine = contender(OURS, "ours", lambda: X.exp())
    truth = [Truth(name="exp", value=X.double().exp())]
    everybody = [mine, *contenders] if all(c.name != OURS for c in contenders) else contenders
    return Pass(name="forward", contenders=everybody, bars={OURS: bars}, truth=truth, tolerance=1e-4, nbytes=8 * len(X))


def measure(one: Pass, **settings: Any) -> dict[str, Any]:
    (row,) = measure_pass(one, "default", Settings(budget=0.001, **settings))
    return row


def test_a_row_has_every_field() -> None:
    row = measure(
        work(
            contender("pow", "eager", lambda: torch.e**X),
            contender("copy", "ceiling", lambda: X.clone()),
            bars=(Bar(kind="speedup", against="eager", limit=1e-6), Bar(kind="error", against="exp", limit=1e-5)),
        )
    )
    assert set(row) == {"pass", "subject", "malloc", "contenders", "skipped", "verdicts"}
    assert [*row["contenders"]] == [OURS, "pow", "copy"]
    for figures in row["contenders"].values():
        assert set(figures) == {
            "family", "rounds", "median_ms", "ratio", "gb_per_s", "gflop_per_s", "peak_mib", "extra_mib", "error",
        }  # fmt: skip
        assert figures["median_ms"] > 0
        assert figures["ratio"] > 0
        assert figures["gb_per_s"] == pytest.approx(8 * len(X) / figures["median_ms"] / 1e6)
        assert figures["rounds"] >= LEAST_ROUNDS
    assert row["contenders"][OURS]["ratio"] == 1
    assert 0 < row["contenders"][OURS]["error"]["exp"] < 1e-6
    assert row["contenders"]["copy"]["error"] == {}
    assert [verdict["met"] for verdict in row["verdicts"]] == [True, True]


def test_a_wrong_rival_is_left_out_and_named() -> None:
    row = measure(work(contender("slightly wrong", "eager", lambda: X.exp() * 1.001)))
    assert [*row["contenders"]] == [OURS]
    assert "exp is wrong" in row["skipped"]["slightly wrong"]


def test_a_rival_that_cannot_run_is_left_out_and_named() -> None:
    def fail() -> Tensor:
        raise RuntimeError("no compiler\nmore words")

    row = measure(work(contender("broken", "compile", fail)))
    assert row["skipped"] == {"broken": "RuntimeError: no compiler"}


def test_a_wrong_result_of_ours_raises() -> None:
    with pytest.raises(WrongResult, match="irlfast: exp is wrong"):
        measure(work(contender(OURS, "ours", lambda: X.exp().roll(1))))


def test_a_family_can_be_left_out() -> None:
    row = measure(work(contender("pow", "peer", lambda: torch.e**X)), skip=("peer",))
    assert [*row["contenders"]] == [OURS]
    assert "on request" in row["skipped"]["pow"]


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ((), "returns 0 outputs"),
        ((torch.zeros(3),), "has shape"),
        ((torch.full((201,), torch.nan),), "is wrong"),
        ((torch.tensor([1.02, *[0.01] * 200]),), "largest error"),
        ((torch.tensor([1.0, *[0.0102] * 200]),), "summed error"),  # each small value wrong, none by much
    ],
)
def test_the_check_sees_wrong_shapes_nans_and_values(result: tuple[Tensor, ...], problem: str) -> None:
    truth = [Truth(name="x", value=torch.tensor([1.0, *[0.01] * 200], dtype=torch.float64))]
    with pytest.raises(WrongResult, match=problem):
        check("form", result, truth, 1e-2)


def test_the_check_gives_the_largest_error() -> None:
    truth = [Truth(name="x", value=torch.ones(4, dtype=torch.float64))]
    assert check("form", (torch.tensor([1.0, 1.0, 1.002, 0.999]),), truth, 1e-2) == {"x": pytest.approx(2e-3, rel=1e-3)}


def test_the_check_looks_at_the_part_it_is_told() -> None:
    truth = [Truth(name="x", value=torch.ones(2, dtype=torch.float64), select=slice(0, 2))]
    assert check("form", (torch.tensor([1.0, 1.0, 9.0]),), truth, 1e-6) == {"x": 0.0}


def test_ratios_are_medians_of_the_rounds_of_both() -> None:
    # The machine slows down fourfold in the second round, and in the last, which only ours runs.
    assert paired_ratio([2.0, 8.0, 2.2], [1.0, 4.0, 1.0, 5.0]) == 2.0


@pytest.mark.parametrize(
    ("family", "seconds", "rounds"),
    [
        ("eager", 1e-3, 30),
        ("eager", 0.1, 5),
        ("eager", 0.4, 3),
        ("eager", 1.5, 2),
        ("ours", 1.5, 3),
        ("ceiling", 1.5, 3),
    ],
)
def test_rounds_fit_the_budget(family: Family, seconds: float, rounds: int) -> None:
    plan = Plan.of(Contender(name="x", family=family, run=tuple, prepare=lambda: None), seconds, budget=0.5)
    assert (plan.rounds, plan.repeats) == (rounds, 1)


def test_a_short_call_is_repeated_within_a_timing() -> None:
    plan = Plan.of(Contender(name="x", family="ours", run=tuple), 1e-5, budget=0.5)
    assert plan.repeats == 200
    assert plan.rounds == 30


def test_a_slower_rival_has_a_larger_ratio_and_meets_the_bar() -> None:
    def slowly() -> Tensor:
        time.sleep(0.004)
        return X.exp()

    bars = (Bar(kind="speedup", against="eager", limit=2),)
    row = measure(work(contender("sleeper", "eager", slowly), bars=bars))
    assert row["contenders"]["sleeper"]["ratio"] > 10
    assert row["verdicts"][0]["met"] is True


def test_peak_memory_counts_what_a_run_needs_beyond_its_outputs() -> None:
    def run() -> tuple[Tensor]:
        scratch = torch.ones(16 << 20)  # 64 MiB
        return ((scratch + 1)[: 1 << 20].clone(),)  # 64 MiB more, of which 4 MiB are returned

    measured = peak_mib(Contender(name="x", family="ours", run=run))
    if measured is None:
        pytest.skip("this system does not reset the peak of a process's memory")
    peak, extra = measured
    assert 126 < peak < 140
    assert extra == pytest.approx(peak - 4)
