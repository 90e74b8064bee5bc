"""Tables between marks on docs/results.md, made from the files of docs/results/."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGE = RESULTS.parent / "results.md"
Tables = Mapping[str, Callable[[], str]]


def renew(page: str, kind: str, tables: Tables) -> str:
    """The page with each table between `<!-- kind: name -->` and `<!-- end -->` made anew.

    Raises:
        ValueError: a mark that names no table.
    """

    def made(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise ValueError(f"no table is called {match['name']!r}; there are {', '.join(tables)}")
        return f"{match['open']}\n{tables[match['name']]()}\n"

    return re.sub(rf"(?P<open><!-- {kind}: (?P<name>[^>]+) -->)\n.*?(?=<!-- end -->)", made, page, flags=re.DOTALL)


def markdown(rows: Iterable[Iterable[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = [list(row) for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
