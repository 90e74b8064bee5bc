"""The report's charts: curves of a run's metrics, and histograms of its rewards."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from . import svg
from .run import Rows, Run

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
_HISTOGRAMS = 6


def curves(run: Run, evaluations: Rows) -> str:
    """The section of curves: known metrics of evaluations and training first, all others behind a fold."""
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


def histograms(samples: Rows, evaluations: Rows) -> str:
    """The section of reward histograms of policy and demonstrations, at a few evaluations over the same bins."""
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
