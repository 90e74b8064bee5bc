"""Each rule on a case made to trigger it, and on one that is fine; together on a log without anything wrong."""

from dataclasses import replace
from typing import Any

import pytest

from irlfast.train.monitors import RULES, MonitorConfig, check

FINE: dict[str, Any] = {
    "reward_length": 0.1,
    "reward_repetition": 0.0,
    "length": 20.0,
    "expert_length": 20.0,
    "repetition": 0.02,
    "expert_repetition": 0.02,
    "kl_per_token": 0.05,
    "entropy": 30.0,
    "reward_auc": 0.7,
    "disagreement_sample": 0.3,
    "disagreement_expert": 0.3,
}
TRAIN: dict[str, Any] = {"reward/ess_relative": 0.6, "reward/auc": 0.65, "reward/advantage_drift": 0.1}


def log(*evaluations: dict[str, Any], train: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A run's log with an evaluation every 10 iterations and training rows between; what is not given is FINE."""
    rows: list[dict[str, Any]] = []
    for index, values in enumerate(evaluations):
        if index:
            rows += [
                {"kind": "train", "iteration": 10 * (index - 1) + i, **TRAIN, **(train or {})} for i in range(1, 11)
            ]
        rows.append({"kind": "eval", "iteration": 10 * index, **FINE, **values})
    return rows


CASES = [
    # rule, an evaluation or training rows that trigger it, ones that just do not, a number the words must hold
    ("length", {"reward_length": 0.8, "length": 26.0}, {"reward_length": 0.8, "length": 21.0}, "30% longer"),
    ("length", {"reward_length": -0.7, "length": 12.0}, {"reward_length": -0.7, "length": 26.0}, "40% shorter"),
    ("length", {"reward_length": 0.6, "length": 30.0}, {"reward_length": 0.4, "length": 30.0}, "+0.60"),
    ("repetition", {"repetition": 0.4}, {"repetition": 0.1}, "40.0% of its 4-grams"),
    ("kl", {"kl_per_token": 0.9}, {"kl_per_token": 0.49}, "0.90 nats a token"),
    ("entropy", {"entropy": 2.0}, {"entropy": 10.0}, "0.100 nats a token, 1.500 at the start"),
    ("ess", {"train": {"reward/ess_relative": 0.04}}, {"train": {"reward/ess_relative": 0.2}}, "4.0%"),
    ("auc_blind", {"reward_auc": 0.51}, {"reward_auc": 0.6}, "AUC 0.51"),
    ("auc_gap", {"train": {"reward/auc": 0.95}}, {"train": {"reward/auc": 0.8}}, "AUC 0.95 on training rows, 0.70"),
    ("advantage_drift", {"train": {"reward/advantage_drift": 1.2}}, {"train": {}}, "by 120%"),
    ("disagreement", {"disagreement_sample": 1.2}, {"disagreement_sample": 0.5}, "4.0 times"),
]


def of_case(values: dict[str, Any]) -> list[dict[str, Any]]:
    return log({}, {}, train=values["train"]) if "train" in values else log({}, values)


@pytest.mark.parametrize(("rule", "bad", "fine", "words"), CASES)
def test_a_rule_speaks_where_it_should_and_only_there(
    rule: str, bad: dict[str, Any], fine: dict[str, Any], words: str
) -> None:
    (alert,) = check(of_case(bad))
    assert alert.rule == rule
    assert words in alert.seen
    assert len(alert.advice) > 40
    assert check(of_case(fine)) == []


def test_a_perfect_reward_is_suspect_only_if_it_stays_so() -> None:
    perfect = {"reward_auc": 0.999}
    train = {"reward/auc": 0.99}
    assert check(log({}, perfect, train=train)) == []  # the first time the policy may still come closer
    (alert,) = check(log({}, perfect, perfect, train=train))
    assert alert.rule == "auc_perfect"
    assert "trivial difference" in alert.seen


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, *_ in CASES} | {"auc_perfect"} == set(RULES)


def test_the_line_can_be_moved() -> None:
    rows = log({}, {"kl_per_token": 0.9})
    assert check(rows, MonitorConfig(kl_per_token=1.0)) == []
    assert [alert.rule for alert in check(rows, replace(MonitorConfig(), length_correlation=0.05))] == ["kl"]


def test_only_training_rows_since_the_last_evaluation_count() -> None:
    rows = log({}, {}, train={"reward/ess_relative": 0.01})
    assert [alert.rule for alert in check(rows)] == ["ess"]
    later = [*rows, *({"kind": "train", "iteration": i, **TRAIN} for i in range(11, 21))]
    later.append({"kind": "eval", "iteration": 20, **FINE})
    assert check(later) == []


def test_what_was_not_measured_is_not_judged() -> None:
    """A reward with one component, a run without a reference, a log whose values are null, an empty log."""
    bare = [
        {"kind": "eval", "iteration": 0},
        {"kind": "eval", "iteration": 5, "reward_auc": None, "kl_per_token": None},
    ]
    assert check(bare) == []
    assert check([]) == []
    assert check([{"kind": "train", "iteration": 1}]) == []
