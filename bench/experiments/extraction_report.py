"""Tables and pictures of the extraction experiments, made from docs/results/extraction_*.

python -m bench.experiments.extraction_report        renews the tables of docs/results.md and the picture
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.experiments.extraction import TRUE_REWARDS
from bench.experiments.page import PAGE, RESULTS, Tables, markdown, renew

Row = dict[str, Any]

KNOWN: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("order of tuned over base", lambda row: row["extraction"]["accuracy"]),
    ("order of the true reward", lambda row: row["extraction"]["truth_accuracy"]),
    ("- by TF-IDF", lambda row: row["tfidf"]["truth_accuracy"]),
    ("Pearson with the true reward", lambda row: row["extraction"]["pearson"]),
    ("- by TF-IDF", lambda row: row["tfidf"]["pearson"]),
    ("Spearman", lambda row: row["extraction"]["spearman"]),
    ("- by TF-IDF", lambda row: row["tfidf"]["spearman"]),
    ("Spearman of reward and length", lambda row: row["extraction"]["length_spearman"]),
    ("Spearman of two starts' rewards", lambda row: row["identifiability"]["spearman_min"]),
    ("distance of two starts' rewards", lambda row: row["identifiability"]["distance_max"]),
    ("true reward: base", lambda row: row["start"]["true_reward"]),
    ("- tuned on it", lambda row: row["tuned"]["true_reward"]),
    ("- tuned on what was extracted", lambda row: row["retuned"]["true_reward"]),
    ("KL: tuned on the true reward", lambda row: row["tuned"]["kl"]),
    ("- tuned on what was extracted", lambda row: row["retuned"]["kl"]),
    ("share of the gain, at the end", lambda row: row["gain_share"]),
    ("equal KL", lambda row: row["equal_kl"]),
    ("share of the gain, at equal KL", lambda row: row["gain_share_at_equal_kl"]),
)
FILES = {
    "toxicity": "tweets",
    "toxicity_shuffled": "tweets, labels shuffled, mean of 8",
    "hh_rlhf": "hh-rlhf",
    "qa_feedback": "qa-feedback",
}
FIGURES = ("accuracy", "auc", "f1", "pearson", "spearman")


def known() -> list[Row]:
    """The chains that were run."""
    path = RESULTS / "extraction_known.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def interval(values: Sequence[float]) -> str:
    """Mean over seeds, and the half width of Student's 95 % interval of it."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {half_width(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def half_width(values: Sequence[float]) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def known_table() -> str:
    """A line a figure, a column a true reward."""
    chains = {name: [row for row in known() if row["true_reward"] == name] for name in TRUE_REWARDS}
    rows = [["", *(f"`{name}`, {len(found)} seeds" for name, found in chains.items())]]
    for label, figure in KNOWN:
        rows.append([label, *(interval([figure(row) for row in found]) for found in chains.values())])
    return markdown(rows)


def labels_table() -> str:
    """A line a file and reward: people's labels and preferences."""
    rows = [["pairs of", "reward", "test pairs", "accuracy (95 % interval)", *FIGURES[1:]]]
    for name, title in FILES.items():
        path = RESULTS / f"extraction_{name}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        told = _mean_of_seeds(report["seeds"]) if report["configuration"]["shuffle_labels"] else report["test"]
        entries = [(title, "learned", told), (title, "TF-IDF", report.get("tfidf"))]
        for other, found in report.get("also", {}).items():
            entries += [
                (f"{other}, not trained on", "TF-IDF" if k == "tf-idf" else "learned", v) for k, v in found.items()
            ]
        rows += [_line(*entry) for entry in entries if entry[2] is not None]
    return markdown(rows)


def _mean_of_seeds(seeds: Sequence[Row]) -> Row:
    """Each figure's mean. What noise taught one reward may agree with the truth by chance, beyond what pairs tell."""
    mean = {name: statistics.mean(row[name] for row in seeds) for name in ("pairs", *FIGURES) if name in seeds[0]}
    half = half_width([row["accuracy"] for row in seeds])
    return {**mean, "accuracy_low": mean["accuracy"] - half, "accuracy_high": mean["accuracy"] + half}


def _line(title: str, reward: str, found: Row) -> list[str]:
    accuracy = f"{found['accuracy']:.3f} ({found['accuracy_low']:.3f} to {found['accuracy_high']:.3f})"
    others = (f"{found[name]:.3f}" if name in found else "-" for name in FIGURES[1:])
    return [title, reward, f"{found['pairs']:.0f}", accuracy, *others]


TABLES: Tables = {"known": known_table, "labels": labels_table}


def draw() -> None:
    """The true reward against the KL of both tunings, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = (("tuned", "tab:gray", "tuned on the true reward"), ("retuned", "tab:blue", "tuned on the extracted one"))
    for axis, name in zip(figure.subplots(1, len(TRUE_REWARDS)), TRUE_REWARDS, strict=True):
        for run, color, label in kinds:
            for row in (row for row in known() if row["true_reward"] == name):
                curve = row["curves"][run]
                axis.plot([p["kl"] for p in curve], [p["true_reward"] for p in curve], color=color, linewidth=1)
            axis.plot([], [], color=color, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("KL to the start (nats a response)")
        axis.set_ylabel("true reward, held-out prompts")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(RESULTS / "extraction_known.png", dpi=110)


def main() -> int:
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), "extraction", TABLES), encoding="utf-8")
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
