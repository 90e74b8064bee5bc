"""The extraction tables of docs/results.md are those that the results make, and what they say of made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("tyro")

from bench.experiments import extraction_report
from bench.experiments.page import PAGE, renew


def test_the_page_has_the_tables_that_the_results_make() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- extraction: ") == len(extraction_report.TABLES)
    assert renew(page, "extraction", extraction_report.TABLES) == page


def test_an_interval_is_of_the_mean_over_seeds() -> None:
    # t = 2.776 with 4 degrees of freedom, sd = sqrt(2.5), / sqrt(5).
    assert extraction_report.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ± 1.963"
    assert extraction_report.interval([0.25]) == "0.250"


def test_each_reward_of_a_file_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(accuracy: float) -> dict[str, Any]:
        interval = {"accuracy": accuracy, "accuracy_low": accuracy - 0.01, "accuracy_high": accuracy + 0.01}
        return {"pairs": 7, **interval, "auc": 0.5, "f1": 0.25}

    report: dict[str, Any] = {"configuration": {"shuffle_labels": False}, "seeds": [found(0.75), found(0.65)]}
    report |= {"test": found(0.75), "tfidf": found(0.8), "also": {"other": {"bradley_terry": found(0.6)}}}
    (tmp_path / "extraction_toxicity.json").write_text(json.dumps(report))
    report["configuration"] = {"shuffle_labels": True}
    (tmp_path / "extraction_toxicity_shuffled.json").write_text(json.dumps({**report, "tfidf": None, "also": {}}))
    monkeypatch.setattr(extraction_report, "RESULTS", tmp_path)
    _, _, learned, rival, other, chance = extraction_report.labels_table().splitlines()
    assert learned == "| tweets | learned | 7 | 0.750 (0.740 to 0.760) | 0.500 | 0.250 | - | - |"
    assert rival.startswith("| tweets | TF-IDF | 7 | 0.800 (")
    assert other.startswith("| other, not trained on | learned | 7 | 0.600 (")
    # t = 12.706 with one degree of freedom, sd = .05 sqrt(2), / sqrt(2).
    assert chance.startswith("| tweets, labels shuffled, mean of 8 | learned | 7 | 0.700 (0.065 to 1.335) |")
