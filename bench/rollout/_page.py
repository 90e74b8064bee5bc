"""The tables of docs/sglang.md, made from docs/results/sglang_*.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.experiments.page import RESULTS, Tables, markdown, renew

PAGE = RESULTS.parent / "sglang.md"
Row = dict[str, Any]
_FIGURES = (
    ("reward AUC, real against generated, at the start", "start/reward_auc", ".3f"),
    ("- at the end", "end/reward_auc", ".3f"),
    ("log-prob of a real token, at the start", "start/expert_token_logprob", ".3f"),
    ("- at the end", "end/expert_token_logprob", ".3f"),
    ("KL to the start, nats a response", "end/kl", ".2f"),
    ("length", "end/length", ".1f"),
    ("repeated 4-grams", "end/repetition", ".4f"),
    ("reward loss, last ten iterations", "reward_loss_last_10", ".2f"),
    ("gap between trainer and sampler, mean", "gap_mean", ".1e"),
    ("- largest", "gap_max", ".1e"),
)


@dataclass(frozen=True)
class Page:
    """Renew the tables of docs/sglang.md from docs/results."""


def learning_table() -> str:
    """A line a figure, a column an engine: mean over seeds, and lowest to highest."""
    rows: list[Row] = _read("sglang_learning.json")["rows"]
    engines = {name: [row for row in rows if row["engine"] == name] for name in ("transformers", "sglang")}
    table = [["", *(f"{name}, {len(mine)} seeds" for name, mine in engines.items())]]
    for label, key, form in _FIGURES:
        table.append([label, *(_spread([row[key] for row in mine], form) for mine in engines.values())])
    return markdown(table)


def overlap_table() -> str:
    """A line an amount of training, with and without overlap: medians of the stretches."""
    table = [["PPO epochs on a batch", "overlap", "samples a second", "share of the time that training waits"]]
    for row in _read("sglang_overlap.json")["summary"]:
        for on in ("off", "on"):
            rate, share = row[f"samples_per_second_{on}"], row[f"waiting_share_{on}"]
            table.append([str(row["epochs"]), on, f"{rate:.1f}", f"{share:.0%}"])
    return markdown(table)


TABLES: Tables = {"learning": learning_table, "overlap": overlap_table}


def write_page() -> None:
    """Renew the tables."""
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), "sglang", TABLES), encoding="utf-8")


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _read(name: str) -> Row:
    found: Row = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found
