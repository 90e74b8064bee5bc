"""docs/slime.md has the figures of docs/results/slime.json, and those show that both losses agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.slime.__main__ import renew

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = json.loads((DOCS / "results" / "slime.json").read_text(encoding="utf-8"))


def test_the_page_has_the_figures_of_its_file() -> None:
    page = (DOCS / "slime.md").read_text(encoding="utf-8")
    assert renew(page, FIGURES) == page
    with pytest.raises(ValueError, match=r"the page has no <!-- figures of slime\.json -->"):
        renew("a page", FIGURES)


def test_both_losses_agreed() -> None:
    assert FIGURES["cases"] == 15
    assert max(FIGURES["largest_difference"].values()) < 5e-6
