"""Verdicts on made-up figures."""

from __future__ import annotations

from typing import Any

import pytest

from bench._case import Bar, judge

OURS = "irlfast"


OP = {"op": 1, "eager op": 1}


def figures(**changes: float | None) -> dict[str, dict[str, Any]]:
    mine: dict[str, Any] = {"family": "ours", "ratio": 1.0, "median_ms": 0.01, "extra_mib": 30.0, "error": {"kl": 3e-7}}
    mine["peak_mib"] = 50.0
    return {
        OURS: {**mine, **changes},
        "eager, slow": {"family": "eager", "ratio": 9.0, "error": {"kl": 5e-7}},
        "eager, quick": {"family": "eager", "ratio": 7.5, "error": {"kl": 6e-7}},
        "compiled": {"family": "compile", "ratio": 2.9, "error": {"kl": 1e-7}},
        "read": {"family": "ceiling", "ratio": 0.92, "error": {}},
        "op": {"family": "yardstick", "ratio": 1.1, "peak_mib": 40.0, "error": {}},
        "eager op": {"family": "yardstick", "ratio": 8.8, "error": {}},
        "one product": {"family": "ceiling", "ratio": 0.3, "error": {}},
    }


@pytest.mark.parametrize(
    ("bar", "value", "against", "met"),
    [
        (Bar(kind="speedup", against="eager", limit=7), 7.5, "eager, quick", True),
        (Bar(kind="speedup", against="eager", limit=7.6), 7.5, "eager, quick", False),
        (Bar(kind="speedup", against="compile", limit=3), 2.9, "compiled", False),
        (Bar(kind="speedup", against="compile", limit=2.9), 2.9, "compiled", True),
        (Bar(kind="speedup", against="peer", limit=1), None, None, None),
        (Bar(kind="share", against={"read": 1}, limit=0.9), 0.92, None, True),
        (Bar(kind="share", against={"read": 1}, limit=0.95), 0.92, None, False),
        (Bar(kind="share", against={"update": 1}, limit=0.1), None, None, None),
        (Bar(kind="overrun", against={"one product": 3}, limit=1.12), 1 / 0.9, None, True),
        (Bar(kind="overrun", against={"one product": 3}, limit=1.1), 1 / 0.9, None, False),
        (Bar(kind="overrun", against={"one product": 2, "read": 1}, limit=1.0), 1 / 1.52, None, True),
        (Bar(kind="parity", against=OP, limit=0.9), 7.5 / 8, "eager, quick", True),
        (Bar(kind="parity", against=OP, limit=1), 7.5 / 8, "eager, quick", False),
        (Bar(kind="parity", against={"op": 1, "not run": 1}, limit=1), None, None, None),
        (Bar(kind="peak", against="op", limit=1.3), 1.25, None, True),
        (Bar(kind="peak", against="op", limit=1.2), 1.25, None, False),
        (Bar(kind="peak", against="read", limit=1), None, None, None),
        (Bar(kind="seconds", limit=12e-6), 1e-5, None, True),
        (Bar(kind="seconds", limit=9e-6), 1e-5, None, False),
        (Bar(kind="extra_mib", limit=40), 30.0, None, True),
        (Bar(kind="extra_mib", limit=29), 30.0, None, False),
        (Bar(kind="error", against="kl", limit=4e-7), 3e-7, "eager, slow", True),
        (Bar(kind="error", against="kl", limit=2e-7), 3e-7, "eager, slow", True),  # as near as eager is enough
    ],
)
def test_verdict(bar: Bar, value: float | None, against: str | None, met: bool | None) -> None:
    verdict = judge(bar, OURS, figures())
    assert verdict["value"] == (None if value is None else pytest.approx(value))
    assert verdict["against"] == against
    assert verdict["met"] is met
    assert verdict["bar"] == str(bar)


def test_an_error_beyond_the_limit_and_eager_is_a_miss() -> None:
    bar = Bar(kind="error", against="kl", limit=2e-7)
    worse = figures()
    worse[OURS]["error"] = {"kl": 5.1e-7}
    assert judge(bar, OURS, worse)["met"] is False


def test_memory_that_was_not_measured_has_no_verdict() -> None:
    assert judge(Bar(kind="extra_mib", limit=40), OURS, figures(extra_mib=None))["met"] is None


@pytest.mark.parametrize(
    ("bar", "words"),
    [
        (Bar(kind="speedup", against="compile", limit=2.4), "at least 2.4 x faster than the best torch.compile"),
        (Bar(kind="speedup", against="eager", limit=7, malloc="tuned"), "best eager PyTorch (tuned malloc)"),
        (Bar(kind="share", against={"read": 1}, limit=0.65), "at least 65% of read bandwidth"),
        (Bar(kind="share", against={"read": 1}, limit=0.8, further=True), "at least 80% of read bandwidth, later"),
        (Bar(kind="overrun", against={"a": 2, "b": 1}, limit=1.1), "at most 1.10 x the bare 2 a + b"),
        (
            Bar(kind="parity", against={"op": 1, "eager op": 1}, limit=1),
            "at least 1 x what op gains over eager PyTorch",
        ),
        (Bar(kind="seconds", limit=12e-6), "at most 12 us a call"),
        (Bar(kind="extra_mib", limit=40), "at most 40 MiB above inputs and outputs"),
        (Bar(kind="error", against="kl", limit=2e-7), "kl within 2e-07 of float64"),
    ],
)
def test_a_bar_says_what_it_asks(bar: Bar, words: str) -> None:
    assert words in str(bar)
