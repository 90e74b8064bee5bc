"""``irlfast demo``: the whole path on data it makes itself, and a table of what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irlfast.report import plot_curves, write_json
from irlfast.reporting import write_report
from irlfast.train.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """Train a small language model on arithmetic, then teach it care by inverse RL from right workings alone: about 3
    minutes, no file needed."""

    out: Path
    """Folder for summary.json, report.html, metrics.jsonl and checkpoints/; must not hold an earlier run."""
    seed: int = 0
    """Seed of the data, the models and the sampling."""


def run_demo(command: DemoCommand) -> int:
    """Run the demonstration; prints a table and writes the files named in DemoCommand."""
    from irlfast.demo import experiment
    from irlfast.demo.toy import make_toy_trainer, toy_recovery

    if (command.out / "metrics.jsonl").exists():
        raise FileExistsError(f"{command.out} holds an earlier run: choose another --out")
    command.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)

    # The models are so small that handing work to a second thread costs more than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        say("a toy language with a known reward: recovering it from 2,000 strings")
        toy_trainer = make_toy_trainer(command.seed)
        toy_trainer.train()
        recovery = toy_recovery(toy_trainer)

        say("arithmetic: training a language model on right and wrong workings")
        data = experiment.make_data(command.seed)
        base = experiment.pretrain(data, command.seed)
        seed = derive_seed(command.seed, "demo accuracy", 0)
        before = experiment.accuracy(base, data, seed)

        say(f"supervised fine-tuning on {len(data.demonstrations)} right workings of other prompts")
        tuned = experiment.fine_tune(base, data)
        supervised = experiment.accuracy(tuned, data, seed)

        say(f"bi-level inverse RL from the same {len(data.demonstrations)} workings")
        trainer = experiment.make_trainer(base, data, experiment.bilevel_config(command.seed), command.out)
        trainer.train()
        after = experiment.accuracy(trainer.policy, data, seed)
        pairs = experiment.reward_pair_accuracy(trainer, data, command.seed)
        greedy = {
            name: experiment.accuracy(model, data, seed, temperature=0.0)
            for name, model in (("before", base), ("sft", tuned), ("after", trainer.policy))
        }
    finally:
        torch.set_num_threads(threads)

    summary: dict[str, Any] = {
        "seed": command.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "policy_accuracy_before": before,
        "policy_accuracy_after": after,
        "sft_accuracy": supervised,
        "reward_pair_accuracy": pairs,
        "toy_pearson": recovery.pearson,
        "toy_tv": recovery.tv,
        "greedy_accuracy_before": greedy["before"],
        "greedy_accuracy_after": greedy["after"],
        "greedy_accuracy_sft": greedy["sft"],
        "demonstrations": len(data.demonstrations),
        "heldout_prompts": len(data.heldout),
    }
    write_json(command.out / "summary.json", summary)
    plot_curves(
        command.out / "metrics.jsonl",
        command.out / "curves.png",
        levels={"accuracy": {"supervised fine-tuning": supervised}},
    )
    write_report(command.out, command.out / "report.html")
    _print(summary, command.out)
    return 0


def _print(summary: dict[str, Any], out: Path) -> None:
    rows = (
        ("right workings on held-out prompts (one sample each)", ""),
        ("  language model before", f"{summary['policy_accuracy_before']:.1%}"),
        ("  supervised fine-tuning", f"{summary['sft_accuracy']:.1%}"),
        ("  bi-level inverse RL", f"{summary['policy_accuracy_after']:.1%}"),
        ("learned reward ranks right above wrong (held-out pairs)", f"{summary['reward_pair_accuracy']:.1%}"),
        ("toy language: correlation with the true reward", f"{summary['toy_pearson']:.4f}"),
        ("toy language: total variation (0 is perfect)", f"{summary['toy_tv']:.4f}"),
        ("seconds", f"{summary['seconds']:.0f}"),
    )
    width = max(len(label) for label, _ in rows)
    print()
    for label, value in rows:
        print(f"{label:<{width}}  {value:>8}".rstrip())
    print(f"\nsummary.json, report.html, metrics.jsonl and checkpoints/ are in {out}")
