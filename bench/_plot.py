"""The results as one picture: how many times faster irlfast is, each bar's limit marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench._report import Row, best_ratio, size, variant

FAMILIES = {"compile": ("best torch.compile", "#1b6ca8"), "eager": ("best eager PyTorch", "#e8893b")}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OVERRUN_COLOR = "#4d8f4d"
LIMIT_COLOR = "#c00000"


def draw(results: Mapping[str, Any], path: str) -> None:
    """Draws as PNG the rows held against rivals or bare products, under the "tuned" allocator where that was measured.

    Raises:
        ValueError: there are none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(results["rows"])
    if not panels:
        raise ValueError("nothing to draw: no row is held against a rival or against bare products")
    columns = _columns(panels)
    inches = 0.24 * max(sum(map(_height, lines)) for lines in columns)
    figure = pyplot.figure(figsize=(9 * len(columns), inches + 0.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.8, inches])
    head, body = halves
    for part, lines in zip(body.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes = part.subplots(len(lines), 1, height_ratios=[_height(line) for line in lines], squeeze=False)[:, 0]
        for axis, (line, rows) in zip(axes, lines, strict=True):
            _draw_panel(axis, line, rows)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for _, color in FAMILIES.values()]
    handles.append(pyplot.Rectangle((0, 0), 0.2, 1, color=LIMIT_COLOR))
    labels = [*(f"x faster than the {label}" for label, _ in FAMILIES.values()), "to reach"]
    head.legend(handles, labels, loc="center", ncols=len(handles), frameon=False, title=_heading(results["runs"]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def _columns(panels: Mapping[str, Sequence[Row]]) -> list[list[tuple[str, Sequence[Row]]]]:
    """Each panel goes to the shorter column, in the order of the lines."""
    columns: list[list[tuple[str, Sequence[Row]]]] = [[] for _ in range(min(2, len(panels)))]
    for panel in panels.items():
        min(columns, key=lambda column: sum(map(_height, column))).append(panel)
    return columns


def _height(panel: tuple[str, Sequence[Row]]) -> float:
    """In rows, with room for title and axis."""
    return len(panel[1]) + 4


def _heading(runs: Mapping[str, Mapping[str, Any]]) -> str:
    machines = " / ".join(dict.fromkeys(f"{r['machine']}, {r['isa']}, torch {r['torch']}" for r in runs.values()))
    return f"irlfast on {machines}: medians of paired rounds"


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows to draw by line: one allocator setting for each thing measured, "tuned" before "default"."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if not any(v["kind"] in ("speedup", "overrun") and v["value"] is not None for v in row["verdicts"]):
            continue
        key = (row["line"], row["work"], size(row), row["dtype"], row["pass"], row["subject"])
        if key not in chosen or row["malloc"] == "tuned":
            chosen[key] = row
    panels: dict[str, list[Row]] = {}
    for row in chosen.values():
        panels.setdefault(row["line"], []).append(row)
    return dict(sorted(panels.items()))


def _overrun(row: Row) -> Mapping[str, Any] | None:
    return next((v for v in row["verdicts"] if v["kind"] == "overrun" and v["value"] is not None), None)


def _draw_panel(axis: Any, line: str, rows: Sequence[Row]) -> None:
    """Horizontal bars, the first row on top: speed-ups, or time beyond the bare products where those are the bar."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    beside_floor = any(_overrun(row) for row in rows)
    for place, row in enumerate(rows):
        if beside_floor:
            _draw_overrun(axis, place, row)
        else:
            _draw_speedups(axis, place, row)
    axis.set_yticks(range(len(rows)), [_label(row, len(works) > 1) for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_title(f"{line}: {works[0]}" if len(works) == 1 else line, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if beside_floor:
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("time beyond that of the bare matrix products, % (less is better)", fontsize=9)
        return
    ratios = [ratio for row in rows for family in FAMILIES if (ratio := best_ratio(row, family)) is not None]
    low, high = 0.8 * min([1.0, *ratios]), 1.5 * max([8.0, *ratios])
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.axvline(1, color="black", linewidth=0.8)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 20, 50, 100) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("x faster (more is better)", fontsize=9)


def _draw_speedups(axis: Any, place: float, row: Row) -> None:
    for offset, (family, (_, color)) in zip((-0.2, 0.2), FAMILIES.items(), strict=True):
        ratio = best_ratio(row, family)
        if ratio is not None:
            limits = [v["limit"] for v in row["verdicts"] if v["kind"] == "speedup" and v["of"] == family]
            _bar(axis, place + offset, 0.36, ratio, color, f"{ratio:.1f}", limits[0] if limits else None, near=1.3)


def _draw_overrun(axis: Any, place: float, row: Row) -> None:
    overrun = _overrun(row)
    if overrun is not None:
        beyond, limit = ((overrun[name] - 1) * 100 for name in ("value", "limit"))
        _bar(axis, place, 0.6, beyond, OVERRUN_COLOR, f"{beyond:+.0f} %", limit, near=1.5)


def _bar(
    axis: Any, place: float, height: float, value: float, color: str, text: str, limit: float | None, near: float
) -> None:
    """A bar, its limit marked; the text stands beyond a limit that is `near` times the value or nearer."""
    axis.barh(place, value, height, color=color)
    end = value
    if limit is not None:
        axis.plot([limit, limit], [place - height / 2, place + height / 2], color=LIMIT_COLOR, linewidth=2.2)
        if value < limit < value * near:
            end = limit
    axis.text(max(end, 0), place, f" {text}", va="center", fontsize=7)


def _label(row: Row, with_work: bool) -> str:
    dtype = SHORT.get(row["dtype"], row["dtype"])
    parts = [size(row), dtype, row["work"] if with_work else "", row["pass"], variant(row)]
    malloc = "" if row["malloc"] == "tuned" else f"({row['malloc']} malloc)"
    return "  ".join(part for part in [*parts, malloc] if part)
