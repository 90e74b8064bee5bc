"""Tables and pictures of the IQ-Learn experiments, made from docs/results/iq_learn_TASK.jsonl.

python -m bench.experiments.iq_report        renews the tables of docs/results.md and the pictures beside the results
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.experiments.page import PAGE, RESULTS, Tables, markdown, renew

Run = dict[str, Any]
LANGUAGE = {
    "held-out NLL": "heldout_nll",
    "r²": "heldout_td_error",
    "KL to start": "heldout_kl",
    "ROUGE-L": "rouge_l@1",
    "self-BLEU": "self_bleu@1",
    "distinct-2": "distinct_2@1",
    "ROUGE-L, T .6": "rouge_l@0.6",
    "self-BLEU, T .6": "self_bleu@0.6",
    "Spearman": "spearman_rouge_l@1",
}
ARITHMETIC = {
    "right": "heldout_accuracy",
    "right, greedy": "heldout_greedy_accuracy",
    "self-BLEU": "heldout_self_bleu",
    "different answers of 2": "heldout_different_answers",
    "validation: right": "validation_accuracy",
    "validation NLL": "validation_nll",
    "step kept": "step",
}


def read(task: str) -> list[Run]:
    """The runs of a task; none where it was not run."""
    path = RESULTS / f"iq_learn_{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean, and the standard deviation over seeds where there are several; "-" where nothing was measured."""
    known = [v for v in values if v is not None and v == v]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.3f}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):.3f}"


def table(groups: Mapping[tuple[str, ...], Sequence[Run]], heads: Sequence[str], columns: Mapping[str, str]) -> str:
    lines = [[*heads, *columns, "seeds"]]
    for key, runs in groups.items():
        cells = [mean_and_spread([run.get(metric) for run in runs]) for metric in columns.values()]
        lines.append([*key, *cells, str(len(runs))])
    return markdown(lines)


def grouped(runs: Sequence[Run], key: Callable[[Run], tuple[str, ...]]) -> dict[tuple[str, ...], list[Run]]:
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def language_table(task: str) -> str:
    columns = dict(LANGUAGE)
    if task == "gsm8k":
        columns |= {"ended": "stopped@1", "exact match": "task@1"}
    runs = grouped(read(task), lambda run: (run["method"],))
    return table(runs, ["method"], columns)


def arithmetic_table() -> str:
    runs = read("arithmetic")
    return table(grouped(runs, lambda r: (str(r["demonstrations"]), r["method"])), ["rows", "method"], ARITHMETIC)


def best_table() -> str:
    """MLE against IQ at the lambda with the most right validation answers, chosen for each seed and number of rows."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for (count, seed), runs in grouped(
        read("arithmetic"), lambda r: (str(r["demonstrations"]), str(r["seed"]))
    ).items():
        del seed
        learned = [run for run in runs if run["method"].startswith("IQ")]
        if learned:
            best = max(learned, key=lambda run: run["validation_accuracy"])
            found.setdefault((count, "MLE"), []).extend(run for run in runs if run["method"] == "MLE")
            found.setdefault((count, "IQ, chosen"), []).append({**best, "lambda": float(best["method"][3:])})
    ordered = dict(sorted(found.items(), key=lambda item: (int(item[0][0]), item[0][1] != "MLE")))
    return table(ordered, ["rows", "method"], {**ARITHMETIC, "λ chosen": "lambda"})


TABLES: Tables = {
    "stories": lambda: language_table("stories"),
    "gsm8k": lambda: language_table("gsm8k"),
    "arithmetic": arithmetic_table,
    "arithmetic, chosen": best_table,
}


def draw(task: str, picture: Path) -> None:
    """Quality (ROUGE-L) against diversity (1 - self-BLEU), a point a method, a line a temperature; bars are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for temperature, marker in (("0.6", "s"), ("1", "o")):
        points = []
        for (method,), runs in grouped(read(task), lambda run: (run["method"],)).items():
            x = [1 - run[f"self_bleu@{temperature}"] for run in runs]
            y = [run[f"rouge_l@{temperature}"] for run in runs]
            several = len(runs) > 1
            spread = {"xerr": statistics.stdev(x), "yerr": statistics.stdev(y)} if several else {}
            middle = statistics.mean(x), statistics.mean(y)
            axis.errorbar(*middle, **spread, fmt=marker, color="C0" if temperature == "1" else "C1", capsize=2)
            axis.annotate(method, middle, textcoords="offset points", xytext=(5, 4), fontsize=7)
            if several:
                points.append(middle)
        axis.plot(*zip(*points, strict=True), linewidth=0.8, color="C0" if temperature == "1" else "C1")
        axis.plot([], [], marker, color="C0" if temperature == "1" else "C1", label=f"temperature {temperature}")
    axis.set_xlabel("diversity: 1 - self-BLEU of 4 answers to one prompt")
    axis.set_ylabel("quality: ROUGE-L to the reference")
    axis.set_title(f"{task}: maximum likelihood and IQ-Learn at several λ", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def main() -> int:
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), "iq", TABLES), encoding="utf-8")
    for task in ("stories", "gsm8k"):
        if read(task):
            draw(task, RESULTS / f"iq_learn_{task}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
