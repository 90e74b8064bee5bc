"""What a person looks at after a run: a table, a picture of the curves, a file of figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irlfast.train.log import read_log

# Panels of the picture: title, the metrics in it, and a level to compare with.
_PANELS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("held-out accuracy", ("accuracy",), None),
    ("reward AUC, demonstrations against samples", ("reward_auc",), 0.5),
    ("log-prob of a held-out demonstration's token (nats)", ("expert_token_logprob",), None),
    ("KL to the start (nats a response)", ("kl",), 0.0),
    ("learned reward", ("reward_expert", "reward_sample"), None),
    ("response length (tokens)", ("length", "expert_length"), None),
    ("share of repeated 4-grams", ("repetition", "expert_repetition"), None),
)


def plot_curves(log: Path, picture: Path, *, levels: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Draw the evaluations of a run against the iteration.

    Args:
        log: the run's metrics.jsonl.
        picture: PNG file to write.
        levels: metric -> {label: value}, horizontal lines to compare with (a rival's figure, say).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(log, "eval")
    panels = [panel for panel in _PANELS if any(name in rows[0] for name in panel[1])]
    columns = 2
    figure = Figure(figsize=(11, 3.0 * -(-len(panels) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axis, (title, names, level) in zip(axes, panels, strict=False):
        for name in names:
            points = [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                label = "demonstrations" if "expert" in name else "samples"
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        for label, value in (levels or {}).get(names[0], {}).items():
            axis.axhline(value, linestyle="--", linewidth=1, color="tab:red", label=label)
        if level is not None:
            axis.axhline(level, linestyle=":", linewidth=1, color="grey")
        _widen(axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        if len(axis.lines) > 1 and any(not line.get_label().startswith("_") for line in axis.lines):
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(picture, dpi=110)


def _widen(axis: Any) -> None:
    """At least a hundredth of the values' size in height: else the last digits of a flat curve look like a story."""
    axis.ticklabel_format(axis="y", useOffset=False)
    low, high = axis.get_ylim()
    least = 0.01 * max(abs(low), abs(high), 1.0)
    if high - low < least:
        middle = (low + high) / 2
        axis.set_ylim(middle - least / 2, middle + least / 2)


def print_comparison(columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print metrics (rows) of several policies (columns)."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column if name != "seconds"))
    width = max(map(len, names))
    print(" " * width + "".join(f"{title:>16}" for title in columns))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{_number(column.get(name)):>16}" for column in columns.values()))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
