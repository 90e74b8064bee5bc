"""Results of a GPU as one picture: the share of the measured ceiling that irlfast reaches, and its best rivals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib

from bench._report import Row, size, variant

COLORS = {"ours": "#1b6ca8", "eager": "#e8893b", "compile": "#4d8f4d", "peer": "#8d5fa8"}
NAMES = {"ours": "irlfast", "eager": "eager PyTorch", "compile": "torch.compile", "peer": "best peer"}


def draw(results: Mapping[str, Any], path: str) -> None:
    """One row of bars for each row of the results, as PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(results["rows"], key=lambda row: row["line"])  # stable
    figure, axis = pyplot.subplots(figsize=(11, 0.42 * len(rows) + 1.5), layout="constrained")
    for place, row in enumerate(rows):
        for offset, (family, share) in enumerate(best_shares(row).items()):
            axis.barh(place - 0.3 + 0.2 * offset, 100 * share, 0.18, color=COLORS[family])
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_xlabel("share of the copy bandwidth (logits, sequences) or of the bf16 product rate (hidden states), %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend([pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()], NAMES.values(), fontsize=8)
    axis.set_title(" / ".join(_heading(run) for run in results["runs"].values()), fontsize=10, loc="left")
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def best_shares(row: Row) -> dict[str, float]:
    """By family: of the row's subject, and of each family's fastest member."""
    ceiling = "of_copy" if row["contenders"][row["subject"]]["of_copy"] is not None else "of_product"
    result = {"ours": row["contenders"][row["subject"]][ceiling]}
    for family in NAMES:
        members = [figures for figures in row["contenders"].values() if figures["family"] == family]
        if family != "ours" and members:
            result[family] = min(members, key=lambda figures: figures["median_ms"])[ceiling]
    return {family: share for family, share in result.items() if share is not None}


def _heading(run: Mapping[str, Any]) -> str:
    copy, product = (run["ceilings"][name] for name in ("copy_gb_per_s", "product_tflop_per_s"))
    return f"{run['gpu']}, torch {run['torch']}: copy {copy:.0f} GB/s, product {product:.0f} TF/s"


def _label(row: Row) -> str:
    return "  ".join(part for part in (row["line"], row["work"], size(row), row["pass"], variant(row)) if part)
