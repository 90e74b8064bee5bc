"""Max-ent, AIRL and GAIL under three policy updates, on the arithmetic of `irlfast demo`.

    python -m bench._objectives --seeds 0 1 2 --out docs/results/objectives_demo.jsonl

For each seed one language model is trained and every combination starts from it, with the same prompts and held-out
problems; only the number of iterations is smaller than the demonstration's own (`--iterations`). A row is added to the
file as soon as its run ends, and a row that is there is not run again. `--table` prints the file's table and runs
nothing.

GAIL is run with the logit as the policy's reward and beta = 0.2: with the demonstration's beta = 1 its policy would aim
at the square root of p_E times the start (irlfast/losses/gail.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irlfast.demo import experiment
from irlfast.train import BiLevelConfig
from irlfast.train.seeds import derive_seed

OBJECTIVES: dict[str, dict[str, Any]] = {
    "maxent": {},
    "airl": {},
    "gail": {"options": {"policy_reward_kind": "logit"}},
}
BETA = {"maxent": 1.0, "airl": 1.0, "gail": 0.2}
UPDATES: dict[str, dict[str, Any]] = {
    "reinforce": {"kind": "reinforce", "epochs": 1, "minibatches": 1},
    "grpo": {"kind": "grpo"},
    "ppo + critic": {"kind": "ppo", "advantage": "gae"},
}
COLUMNS = {
    "right workings": ("accuracy", "{:.3f}"),
    "held-out AUC": ("reward_auc", "{:.3f}"),
    "KL, nats a response": ("kl", "{:.2f}"),
}


def configuration(seed: int, objective: str, update: str, iterations: int) -> BiLevelConfig:
    """The demonstration's configuration with another objective and policy update."""
    base = experiment.bilevel_config(seed)
    return replace(
        base,
        iterations=iterations,
        reward_warmup_steps=30,
        eval_every=iterations,
        beta=BETA[objective],
        policy=replace(base.policy, **UPDATES[update]),
        reward=replace(base.reward, objective=objective, **OBJECTIVES[objective]),
    )


def run(seed: int, iterations: int, out: Path) -> None:
    """Add the rows of a seed that the file does not have yet."""
    done = {(row["seed"], row["objective"], row["update"]) for row in read(out)} if out.exists() else set()
    wanted = [(o, u) for u in UPDATES for o in OBJECTIVES if (seed, o, u) not in done]
    if not wanted:
        return
    data = experiment.make_data(seed)
    base = experiment.pretrain(data, seed)
    before = experiment.accuracy(base, data, derive_seed(seed, "demo accuracy", 0))
    for objective, update in wanted:
        start = time.process_time()
        trainer = experiment.make_trainer(base, data, configuration(seed, objective, update, iterations), None)
        metrics = trainer.train()
        shown = [name for name, _ in COLUMNS.values()]
        row = {
            "seed": seed,
            "objective": objective,
            "update": update,
            "iterations": iterations,
            "beta": BETA[objective],
            "accuracy_before": before,
            **{name: metrics[name] for name in (*shown, "reward_expert", "reward_sample", "entropy")},
            "reward_pair_accuracy": experiment.reward_pair_accuracy(trainer, data, seed),
            "heldout_prompts": len(trainer.heldout),
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(rows: Sequence[dict[str, Any]], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> list[str]:
    """Markdown lines: mean and (lowest to highest) over the seeds of each combination.

    Args:
        rows: with objective, update and what the columns name.
        columns: heading -> (name in a row, format); those of the demonstration.
    """
    lines = [f"| objective | policy update | seeds | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for objective in OBJECTIVES:
        for update in UPDATES:
            found = [row for row in rows if (row["objective"], row["update"]) == (objective, update)]
            if not found:
                continue
            cells = []
            for name, form in columns.values():
                values = [row[name] for row in found]
                mean, low, high = (form.format(v) for v in (statistics.mean(values), min(values), max(values)))
                cells.append(f"{mean} ({low} to {high})")
            lines.append(f"| {objective} | {update} | {len(found)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/results/objectives_demo.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of --out and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            run(seed, arguments.iterations, arguments.out)
    print("\n".join(table(read(arguments.out))))


if __name__ == "__main__":
    main()
