"""Results as text: what the terminal shows while measuring, the verdict on each bar, and the tables for the docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Verdict = Mapping[str, Any]

WORDS = {True: "met", False: "MISSED", None: "not measured"}


def size(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def title(row: Row) -> str:
    return f"{row['line']}: {row['work']}, {size(row)}, {row['dtype']}, {row['pass']}, {row['malloc']} malloc"


def variant(row: Row) -> str:
    """Which of irlfast's ways a row is about; empty for the plain one."""
    name: str = row["subject"]
    return name.removeprefix("irlfast").lstrip(", ")


def value_text(verdict: Verdict) -> str:
    """The value in the unit of its bar."""
    value, kind = verdict["value"], verdict["kind"]
    if value is None:
        return "-"
    if kind == "share":
        return f"{value:.0%}"
    if kind == "seconds":
        return f"{value * 1e6:.1f} us"
    if kind == "extra_mib":
        return f"{value:.0f} MiB"
    if kind == "error":
        return f"{value:.2g}"
    return f"{value:.2f}"


def milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def print_rows(rows: Sequence[Row]) -> None:
    """What every contender took, once for the rows that were timed together, and each row's verdicts."""
    before = None
    for row in rows:
        if title(row) != before:
            before = title(row)
            _print_contenders(row)
        if row["verdicts"]:
            print(f"  {row['subject']}:")
        for verdict in row["verdicts"]:
            beside = f" ({verdict['against']})" if verdict["against"] else ""
            print(f"    {WORDS[verdict['met']]}: {verdict['bar']}: {value_text(verdict)}{beside}", flush=True)


def _print_contenders(row: Row) -> None:
    print(f"\n{title(row)}")
    on_gpu = "of_copy" in row["contenders"][row["subject"]]
    shares = f"{'of copy':>9}{'of product':>12}" if on_gpu else ""
    print(f"  {'':50}{'ms':>10}{'ratio':>7}{'GB/s':>7}{'GF/s':>7}{shares}{'peak MiB':>10}  largest error")
    for name, figures in row["contenders"].items():
        errors = ", ".join(f"{output} {error:.1e}" for output, error in figures["error"].items())
        print(
            f"  {name:50}{milliseconds(figures['median_ms']):>10}{figures['ratio']:7.2f}"
            f"{_number(figures['gb_per_s'], 1):>7}{_number(figures['gflop_per_s'], 0):>7}"
            + (f"{_percent(figures['of_copy']):>9}{_percent(figures['of_product']):>12}" if on_gpu else "")
            + f"{_number(figures['peak_mib'], 0):>10}  {errors}"
        )
    if row.get("impl") == "reference":
        print("  irlfast has no kernel for this here: it ran its reference")
    for name, reason in row["skipped"].items():
        print(f"  {name}: left out, {reason}")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each line and bar: of how many it is asked, how many meet it, and the worst."""
    result: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            entry = result.setdefault(
                (row["line"], verdict["bar"]),
                {"line": row["line"], "bar": verdict["bar"], "asked": 0, "met": 0, "missing": 0, "worst": None},
            )
            entry["asked"] += 1
            entry["met"] += verdict["met"] is True
            entry["missing"] += verdict["met"] is None
            if verdict["met"] is not None and (entry["worst"] is None or _worse(verdict, entry["worst"][1])):
                entry["worst"] = (row, verdict)
    return list(result.values())


def _worse(verdict: Verdict, other: Verdict) -> bool:
    if verdict["met"] != other["met"]:
        return not verdict["met"]
    lower_is_worse = verdict["kind"] in ("speedup", "share", "parity")
    return bool(verdict["value"] < other["value"] if lower_is_worse else verdict["value"] > other["value"])


def _counts(entry: Mapping[str, Any]) -> str:
    missing = f", {entry['missing']} not measured" if entry["missing"] else ""
    return f"{entry['met']} of {entry['asked']}{missing}"


def _worst(entry: Mapping[str, Any]) -> str:
    if entry["worst"] is None:
        return "-"
    row, verdict = entry["worst"]
    where = [size(row), row["dtype"], row["pass"], variant(row), row["malloc"]]
    return f"{value_text(verdict)} ({', '.join(filter(None, where))})"


def print_summary(rows: Sequence[Row]) -> None:
    print("\nline     met            bar, and its worst case")
    for entry in summary(rows):
        print(f"{entry['line']:9}{_counts(entry):14}  {entry['bar']}: {_worst(entry)}")


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    rows = sorted(results["rows"], key=lambda row: row["line"])  # stable
    parts = [_origin(results), _markdown_summary(rows)]
    lines = dict.fromkeys(row["line"] for row in rows)
    parts.extend(_markdown_line(line, [row for row in rows if row["line"] == line]) for line in lines)
    return "\n\n".join(parts)


def headline(results: Mapping[str, Any]) -> str:
    """A short table for the README: each line's first shape in float32 under the tuned allocator."""
    rows = [row for row in results["rows"] if row["malloc"] == "tuned" and row["dtype"] == "float32"]
    first = {(row["line"], row["work"]): size(row) for row in reversed(rows)}
    body = []
    for row in sorted(rows, key=lambda row: row["line"]):
        ratios = [best_ratio(row, family) for family in ("eager", "compile")]
        if size(row) == first[row["line"], row["work"]] and any(ratio is not None for ratio in ratios):
            what = ", ".join(filter(None, [row["pass"], variant(row)]))
            milli = milliseconds(row["contenders"][row["subject"]]["median_ms"])
            body.append([row["work"], size(row), what, milli, *(_number(ratio, 1) for ratio in ratios)])
    return table(["work", "shape", "pass", "ms", "x eager", "x torch.compile"], body)


def _origin(results: Mapping[str, Any]) -> str:
    lines = []
    for run in results["runs"].values():
        load = "unknown" if run["load_average"] is None else f"{run['load_average'][0]:.1f}"
        peers = "".join(f", {name} {version}" for name, version in run.get("peers", {}).items())
        lines.append(
            f"{run['date'][:10]}, `{run['command']}`: {run['machine']}, {run['cores']} cores, {run['isa']}, "
            f"load average {load} at the start; torch {run['torch']}{peers}."
        )
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines.extend("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join(lines)


def _markdown_summary(rows: Sequence[Row]) -> str:
    entries = summary(rows)
    return table(
        ["line", "bar", "met", "worst case"],
        ([entry["line"], entry["bar"], _counts(entry), _worst(entry)] for entry in entries),
    )


def _markdown_line(line: str, rows: Sequence[Row]) -> str:
    """One row for each thing measured, the allocator settings side by side where both were."""
    together: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["work"], size(row), row["dtype"], row["pass"], variant(row), row["threads"])
        together.setdefault(key, {})[row["malloc"]] = row
    mallocs = [m for m in ("tuned", "default", "caching") if any(m in found for found in together.values())]
    header = ["work", "shape", "dtype", "pass", "variant", "threads"]
    for malloc in mallocs:
        header += [f"{malloc}: ms", "x eager", "x torch.compile", "x best peer", "of the ceiling"]
    header += ["MiB above inputs", "error"]
    body = []
    for key, found in together.items():
        cells = [str(part) for part in key]
        for malloc in mallocs:
            cells += _figures(found[malloc]) if malloc in found else [""] * 5
        mine = [row["contenders"][row["subject"]] for row in found.values()]
        peaks = [figures["peak_mib"] for figures in mine if figures["peak_mib"] is not None]
        errors = {output: error for figures in mine for output, error in figures["error"].items()}
        cells.append(_number(max(peaks), 0) if peaks else "")
        cells.append(", ".join(f"{output} {error:.1e}" for output, error in errors.items()))
        body.append(cells)
    return f"### Line {line}\n\n" + table(header, body)


def _figures(row: Row) -> list[str]:
    figures = row["contenders"]
    cells = [milliseconds(figures[row["subject"]]["median_ms"])]
    cells += [_number(best_ratio(row, family), 2) for family in ("eager", "compile", "peer")]
    shares = [value_text(v) for v in row["verdicts"] if v["kind"] in ("share", "overrun") and not v["further"]]
    return [*cells, ", ".join(shares)]


def best_ratio(row: Row, family: str) -> float | None:
    """Time of the family's fastest member / ours, or None where it has none."""
    return min((f["ratio"] for f in row["contenders"].values() if f["family"] == family), default=None)
