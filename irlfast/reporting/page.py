"""``irlfast report``: one HTML page of a run that needs no other file, no network and no script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import charts, svg, tokens
from .run import Rows, Run, read_run
from .style import CSS

_TILES = (
    ("accuracy", "held-out accuracy"),
    ("reward_auc", "held-out AUC"),
    ("kl_per_token", "KL, nats a token"),
    ("expert_token_logprob", "log-prob of demonstrations"),
    ("length", "length, tokens"),
    ("repetition", "repeated 4-grams"),
)


def write_report(folder: Path, page: Path) -> None:
    """Write the report of the run in `folder` to `page`, whole or not at all. Errors: see read_run."""
    text = render_report(read_run(folder))
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, page)


def render_report(run: Run) -> str:
    """The page as HTML."""
    evaluations = run.of_kind("eval")
    sections = [
        _header(run, evaluations),
        _alerts(run.of_kind("warning"), evaluations),
        _summary(run.summary),
        charts.curves(run, evaluations),
        charts.histograms(run.samples, evaluations),
        _samples(run.samples),
        _configuration(run.config),
    ]
    title = escape(f"{run.name}: irlfast report")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body>{svg.hatching()}<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(run: Run, evaluations: Rows) -> str:
    last = max((row["iteration"] for row in run.rows), default=0)
    planned = run.config.get("train", run.config).get("iterations")
    progress = f"iteration {last}" + (f" of {planned}" if planned else "")
    model = run.config.get("model")
    reads = f" · {escape(str(model))}" if model else ""
    tiles = []
    if evaluations:
        for name, label in _TILES:
            values = [row[name] for row in evaluations if row.get(name) is not None]
            if values:
                tiles.append(
                    f'<div class="card tile"><span class="soft">{label}</span><b>{svg.number(values[-1])}</b>'
                    f'<span class="soft">at the start {svg.number(values[0])}</span></div>'
                )
    grid = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else '<p class="soft">No evaluation yet.</p>'
    return f'<header><h1>{escape(run.name)}</h1><p class="soft">{progress}{reads}</p>{grid}</header>'


def _alerts(warnings: Rows, evaluations: Rows) -> str:
    if not evaluations:
        return ""
    now = evaluations[-1]["iteration"]
    current = [row for row in warnings if row["iteration"] == now]
    parts = ["<section><h2>Warnings</h2>"]
    if current:
        parts.append(f'<ul class="alerts">{"".join(_alert(row) for row in current)}</ul>')
    else:
        parts.append("<p>None at the last evaluation.</p>")
    earlier: dict[str, Rows] = {}
    for row in warnings:
        if row["rule"] not in {r["rule"] for r in current}:
            earlier.setdefault(row["rule"], []).append(row)
    if earlier:
        items = [
            f"<li><p><strong>{_times(rows)}</strong> {escape(rows[-1]['seen'])}</p></li>" for rows in earlier.values()
        ]
        parts.append(
            f"<details><summary>Earlier warnings that no longer hold ({len(items)})</summary>"
            f'<ul class="alerts">{"".join(items)}</ul></details>'
        )
    return "".join([*parts, "</section>"])


def _alert(row: Mapping[str, Any]) -> str:
    return (
        f'<li><p><span aria-hidden="true">⚠ </span><strong>{escape(row["seen"])}</strong></p>'
        f"<p>What to change: {escape(row['advice'])}</p></li>"
    )


def _times(rows: Rows) -> str:
    first, last = rows[0]["iteration"], rows[-1]["iteration"]
    return f"At iteration {first}:" if first == last else f"From iteration {first} to {last}:"


def _summary(summary: Mapping[str, Any]) -> str:
    columns = {name: column for name, column in summary.items() if isinstance(column, Mapping)}
    if not columns:
        return ""
    names = list(dict.fromkeys(name for column in columns.values() for name in column if name != "seconds"))
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{_value(column.get(name))}</td>" for column in columns.values())
        + "</tr>"
        for name in names
    )
    table = f"<table class='figures'><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section><h2>Comparison</h2><div class="wide">{table}</div></section>'


def _samples(samples: Rows) -> str:
    samples = [row for row in samples if row.get("rows")]
    if not samples:
        return ""
    *earlier, last = samples
    parts = [
        "<section><h2>Best and worst responses</h2>",
        f"<p>At iteration {last['iteration']}, by the learned reward. The prompt is in italics.</p>",
    ]
    kinds = {row.get("kind") for row in last["rows"]}
    if kinds - {None}:
        meaning = (
            "Each token's own reward" if "attribution" not in kinds else "How much of the reward is owed to each token"
        )
        parts.append(
            f"<p>{meaning}: <span class='for s3'>blue, underlined</span> raises it above the average served, "
            "<span class='against s3'>orange, dotted</span> lowers it; stronger is more, and the number is under the "
            "pointer.</p>"
        )
    parts.append(_groups(last))
    if earlier:
        count = min(4, len(earlier))
        picked = [earlier[round(i * (len(earlier) - 1) / max(1, count - 1))] for i in range(count)]
        parts += [
            f"<details><summary>At iteration {row['iteration']}</summary>{_groups(row)}</details>"
            for row in reversed(picked)
        ]
    return "".join([*parts, "</section>"])


def _groups(record: Mapping[str, Any]) -> str:
    """The responses of one evaluation: the policy's, best and worst, then the demonstrations."""
    level, scale = record.get("reward_level") or 0.0, record.get("reward_scale") or 1.0
    colours = tokens.colour_scale(record["rows"], level)
    parts = []
    for source, title in (("policy", "policy's"), ("demonstration", "demonstrations")):
        rows = [row for row in record["rows"] if row["source"] == source]
        half = (len(rows) + 1) // 2
        for name, part in (("Best", rows[:half]), ("Worst", rows[half:])):
            if part:
                cards = "".join(_sample(row, level, scale, colours) for row in part)
                label = f"{name} of the policy's answers" if source == "policy" else f"{name} of the {title}"
                parts.append(f'<h3>{label}</h3><div class="samples">{cards}</div>')
    return "".join(parts)


def _sample(row: Mapping[str, Any], level: float, scale: float, colours: float) -> str:
    return (
        f'<article class="card"><h4>{escape(tokens.sample_heading(row, level, scale))}</h4>'
        f"{tokens.coloured_response(row, level, colours)}{tokens.listed_tokens(row, level)}</article>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{_value(value)}</td></tr>'
        for name, value in _flat(config)
    )
    return (
        "<section><h2>Configuration</h2><details open><summary>Every option of the run</summary>"
        f'<div class="wide"><table><tbody>{rows}</tbody></table></div></details></section>'
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return svg.number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return escape(", ".join(map(str, value)) or "none")
    return escape(str(value))
