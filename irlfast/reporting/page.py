"""``irlfast report``: one HTML page of a run that needs no other file, no network and no script."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import svg, tokens
from .run import Rows, Run, read_run
from .style import CSS

# Title, what it means, (metric, label, style) of each line, and a level to compare with.
Panel = tuple[str, str, tuple[tuple[str, str, str], ...], tuple[float, str] | None]
_EVALUATION: tuple[Panel, ...] = (
    ("Held-out accuracy", "share of held-out prompts answered rightly", (("accuracy", "policy", "policy"),), None),
    (
        "AUC of the reward",
        "chance that a held-out demonstration is rewarded above a sample",
        (("reward_auc", "held-out", "policy"),),
        (0.5, "chance"),
    ),
    (
        "Learned reward",
        "means over held-out prompts",
        (("reward_sample", "policy", "policy"), ("reward_expert", "demonstrations", "expert")),
        None,
    ),
    ("KL to the start", "nats a token", (("kl_per_token", "policy", "policy"),), None),
    (
        "Log-prob of demonstrations",
        "nats a token, under the policy, held-out",
        (("expert_token_logprob", "policy", "policy"),),
        None,
    ),
    ("Entropy", "nats a response", (("entropy", "policy", "policy"),), None),
    (
        "Length",
        "tokens a response",
        (("length", "policy", "policy"), ("expert_length", "demonstrations", "expert")),
        None,
    ),
    (
        "Repetition",
        "share of 4-grams said before",
        (("repetition", "policy", "policy"), ("expert_repetition", "demonstrations", "expert")),
        None,
    ),
    (
        "What the reward follows",
        "rank correlation with length (dashed) and with repetition",
        (("reward_repetition", "repetition", "policy"), ("reward_length", "length", "expert")),
        (0.0, ""),
    ),
    (
        "Disagreement of the ensemble",
        "standard deviation over its members",
        (("disagreement_sample", "policy", "policy"), ("disagreement_expert", "demonstrations", "expert")),
        None,
    ),
)
_IQ_LEARN: tuple[Panel, ...] = (
    ("Held-out NLL", "nats a token", (("heldout_nll", "held-out", "policy"),), None),
    ("TD error", "mean squared reward a token, held-out", (("heldout_td_error", "held-out", "policy"),), None),
    ("Reward", "mean a token, held-out", (("heldout_reward", "held-out", "policy"),), None),
    (
        "Logit and value",
        "means over held-out tokens",
        (("heldout_q", "logit q of the token", "policy"), ("heldout_value", "value V", "expert")),
        None,
    ),
    ("KL to the start", "nats a token, held-out, exact", (("heldout_kl", "held-out", "policy"),), None),
)
_TRAINING: tuple[Panel, ...] = (
    (
        "Training AUC",
        "demonstrations above samples, rows of the step",
        (("reward/auc", "training", "policy"),),
        (0.5, "chance"),
    ),
    (
        "Effective samples",
        "share of the samples that carry the weights",
        (("reward/ess_relative", "share", "policy"),),
        None,
    ),
    (
        "Advantage drift",
        "change of the advantages by the reward steps",
        (("reward/advantage_drift", "change", "policy"),),
        None,
    ),
    ("Reward loss", "of the step", (("reward/loss", "loss", "policy"),), None),
    ("Policy loss", "of the step", (("policy/loss", "loss", "policy"),), None),
)
_TILES = (
    ("accuracy", "held-out accuracy"),
    ("reward_auc", "held-out AUC"),
    ("kl_per_token", "KL, nats a token"),
    ("expert_token_logprob", "log-prob of demonstrations"),
    ("length", "length, tokens"),
    ("repetition", "repeated 4-grams"),
)
_HISTOGRAMS = 6


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
        _curves(run, evaluations),
        _histograms(run.samples, evaluations),
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


def _curves(run: Run, evaluations: Rows) -> str:
    training = run.of_kind("train")
    shown = [c for panel in (*_EVALUATION, *_IQ_LEARN) if (c := _chart(panel, evaluations))]
    shown += [c for panel in _TRAINING if (c := _chart(panel, training))]
    if not shown:
        return ""
    known = {metric for panel in (*_EVALUATION, *_IQ_LEARN, *_TRAINING) for metric, _, _ in panel[2]}
    others = [
        chart
        for rows in (evaluations, training)
        for name in _numeric(rows, known)
        if (chart := _chart((name, "", ((name, name, "policy"),), None), rows))
    ]
    rest = f'<div class="charts">{"".join(others)}</div>'
    rest = f"<details><summary>All other metrics ({len(others)})</summary>{rest}</details>" if others else ""
    return f'<section><h2>Curves</h2>{_legend()}<div class="charts">{"".join(shown)}</div>{rest}</section>'


def _chart(panel: Panel, rows: Rows) -> str:
    """A card with the panel's lines, or nothing where the rows have none of its metrics."""
    title, meaning, lines, level = panel
    series = []
    for metric, label, style in lines:
        points = [(float(row["iteration"]), float(row[metric])) for row in rows if row.get(metric) is not None]
        if points:
            series.append(svg.Series(label=label, points=points, style=style))
    if not series:
        return ""
    value, label = level or (None, "")
    chart = svg.line_chart(title, series, level=value, level_label=label)
    return f'<figure class="card"><h3>{escape(title)}</h3><p class="soft">{escape(meaning)}</p>{chart}</figure>'


def _legend() -> str:
    line = '<line class="line {0}" x1="0" x2="34" y1="7" y2="7"/>'
    policy = f'<svg aria-hidden="true">{line.format("policy")}<circle class="mark policy" cx="17" cy="7" r="3"/></svg>'
    square = '<rect class="mark expert" x="14" y="4" width="6" height="6"/>'
    expert = f'<svg aria-hidden="true">{line.format("expert")}{square}</svg>'
    return f'<ul class="legend"><li>{policy} policy</li><li>{expert} demonstrations</li></ul>'


def _numeric(rows: Rows, known: Iterable[str]) -> list[str]:
    skip = {"iteration", "seconds", *known}
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    return [name for name in names if name not in skip]


def _histograms(samples: Rows, evaluations: Rows) -> str:
    samples = [row for row in samples if row.get("policy_rewards") and row.get("expert_rewards")]
    if not samples:
        return ""
    count = min(_HISTOGRAMS, len(samples))
    picked = [samples[round(i * (len(samples) - 1) / max(1, count - 1))] for i in range(count)]
    drawn = [r for row in picked for name in ("policy_rewards", "expert_rewards") for r in row[name] if r is not None]
    low, high = min(drawn), max(drawn)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    auc = {row["iteration"]: row.get("reward_auc") for row in evaluations}
    cards = []
    for row in picked:
        title = f"Iteration {row['iteration']}"
        known = auc.get(row["iteration"])
        note = f"AUC {known:.2f}" if known is not None else ""
        parts = [[r for r in row[name] if r is not None] for name in ("policy_rewards", "expert_rewards")]
        if not all(parts):
            continue
        chart = svg.histograms(title, parts[0], parts[1], (low, high))
        cards.append(f'<figure class="card"><h3>{title}</h3><p class="soft">{note}</p>{chart}</figure>')
    legend = (
        '<ul class="legend"><li><svg aria-hidden="true"><rect class="bar policy" x="1" y="1" width="32" height="12"/>'
        '</svg> policy</li><li><svg aria-hidden="true"><rect class="bar expert" x="1" y="1" width="32" height="12"/>'
        "</svg> demonstrations</li></ul>"
    )
    return (
        "<section><h2>Rewards over time</h2><p class='soft'>Raw rewards of held-out demonstrations and of the policy's "
        "answers to the same prompts; the closer the two, the less the reward tells them apart.</p>"
        f'{legend}<div class="charts">{"".join(cards)}</div></section>'
    )


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
