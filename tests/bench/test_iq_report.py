"""The tables of docs/results.md are those that the results make, and what they say of made-up runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.experiments import iq_report
from bench.experiments.page import PAGE, renew


def test_the_page_has_the_tables_that_the_results_make() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- iq: " in page
    assert renew(page, "iq", iq_report.TABLES) == page


def test_means_and_spreads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iq_report, "RESULTS", tmp_path)
    runs = [
        {"method": "MLE", "heldout_nll": 1.0, "spearman_rouge_l@1": None},
        {"method": "MLE", "heldout_nll": 2.0, "spearman_rouge_l@1": None},
        {"method": "IQ 0.1", "heldout_nll": 3.0, "spearman_rouge_l@1": 0.5},
    ]
    (tmp_path / "iq_learn_stories.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    head, _, mle, iq = iq_report.language_table("stories").splitlines()
    assert head.startswith("| method | held-out NLL |")
    assert mle.startswith("| MLE | 1.500 ± 0.707 |")
    assert mle.endswith("| - | 2 |")
    assert iq.startswith("| IQ 0.1 | 3.000 |")
    assert iq.endswith("| 0.500 | 1 |")
    page = "a\n<!-- iq: stories -->\nold\n<!-- end -->\nb\n"
    assert (
        renew(page, "iq", iq_report.TABLES)
        == f"a\n<!-- iq: stories -->\n{iq_report.language_table('stories')}\n<!-- end -->\nb\n"
    )
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        renew("<!-- iq: nothing -->\n<!-- end -->", "iq", iq_report.TABLES)


def test_the_best_lambda_is_chosen_by_validation_answers_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iq_report, "RESULTS", tmp_path)
    runs = []
    for seed, best in ((0, "IQ 0.01"), (1, "IQ 0.1")):
        for method in ("MLE", "IQ 0.01", "IQ 0.1"):
            run = {"method": method, "seed": seed, "demonstrations": 100}
            run["validation_accuracy"] = 0.9 if method == best else 0.5
            # What was not chosen did better on the held-out rows: that must not count.
            runs.append({**run, "heldout_accuracy": 0.4 if method == best else 0.8})
    (tmp_path / "iq_learn_arithmetic.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    _, _, mle, iq = iq_report.best_table().splitlines()
    assert mle.startswith("| 100 | MLE | 0.800 ± 0.000 |")
    assert iq.startswith("| 100 | IQ, chosen | 0.400 ± 0.000 |")
    assert iq.endswith("| 0.055 ± 0.064 | 2 |")
