"""The tables of docs/sglang.md are those that the results make."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")

from bench.experiments.page import renew
from bench.rollout._page import PAGE, TABLES


def test_the_page_has_the_tables_that_the_results_make() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- sglang: ") == len(TABLES)
    assert renew(page, "sglang", TABLES) == page
