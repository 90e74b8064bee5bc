"""Measure whole runs by what samples them, on a real SGLang server that it starts:

python -m bench.rollout learning    the same run sampled by TransformersEngine and by SGLang: does it learn the same?
python -m bench.rollout overlap     SGLang with and without overlap: samples a second, and how long training waits
python -m bench.rollout page        renews the tables of docs/sglang.md
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import _results
from irlfast.commands.bilevel import prepare, run_bilevel
from irlfast.rollout import Rollouts
from irlfast.train import BiLevelTrainer
from irlfast.train.log import read_log
from irlfast.train.prefetch import Prefetch

from ._page import Page, write_page
from ._runs import Setting, command, start_server, with_overlap

_FIGURES = ("reward_auc", "expert_token_logprob", "kl", "reward_expert", "reward_sample", "length", "repetition")


@dataclass(frozen=True, kw_only=True)
class Learning(Setting):
    """The same run sampled by TransformersEngine and by SGLang."""

    json: Path
    """Where the figures go; runs of other seeds that it holds stay."""
    iterations: int = 30
    """Outer iterations of a run."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds."""


@dataclass(frozen=True, kw_only=True)
class Overlap(Setting):
    """The same iterations with and without overlap, in turn."""

    json: Path
    """Where the figures go."""
    iterations: int = 5
    """Iterations of a stretch; the first is not counted."""
    rounds: int = 2
    """Stretches of each kind; figures are their medians."""
    epochs: tuple[int, ...] = (1, 6)
    """PPO epochs: how much training stands against a batch's sampling."""


def learning(options: Learning) -> dict[str, Any]:
    """Figures at the start and at the end of each run, and the gap between trainer and sampler over it."""
    rows: list[dict[str, Any]] = []
    _other_seeds(options)  # refused now rather than after the runs
    server = start_server(options)
    try:
        for seed in options.seeds:
            for engine, url in (("transformers", None), ("sglang", server.server.url)):
                row = _learned(options, url, seed)
                rows.append({"seed": seed, "engine": engine, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        server.close()
    return {"iterations": options.iterations, "rows": [*_other_seeds(options), *rows]}


def _other_seeds(options: Learning) -> list[dict[str, Any]]:
    """The file's runs of other seeds. ValueError: they are of another length."""
    if not options.json.exists():
        return []
    found = json.loads(options.json.read_text(encoding="utf-8"))
    if found["iterations"] != options.iterations:
        raise ValueError(f"{options.json} has runs of {found['iterations']} iterations, not {options.iterations}")
    return [row for row in found["rows"] if row["seed"] not in options.seeds]


def _learned(options: Learning, url: str | None, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.perf_counter()
        run_bilevel(command(options, url, seed, out, options.iterations))
        evaluations = {row["iteration"]: row for row in read_log(out / "metrics.jsonl", "eval")}
        steps = read_log(out / "metrics.jsonl", "train")
    row = {"seconds": round(time.perf_counter() - start, 1)}
    for name in _FIGURES:
        row[f"start/{name}"] = evaluations[0][name]
        row[f"end/{name}"] = evaluations[options.iterations][name]
    row["gap_mean"] = statistics.fmean(step["policy/gap_mean"] for step in steps)
    row["gap_max"] = max(step["policy/gap_max"] for step in steps)
    row["reward_loss_last_10"] = statistics.fmean(step["reward/loss"] for step in steps[-10:])
    return row


class _Clocked:
    """An engine that notes how long it was waited for."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *given: Any, **named: Any) -> Rollouts:
        start = time.perf_counter()
        try:
            return self._engine.generate(*given, **named)
        finally:
            self.waited += time.perf_counter() - start


def overlap(options: Overlap) -> dict[str, Any]:
    """Samples a second and the share of time that the trainer waited, for each amount of training."""
    rows: list[dict[str, Any]] = []
    server = start_server(options)
    run = command(options, server.server.url, 0, Path("unused"), 10_000)
    try:
        for epochs in options.epochs:
            for _ in range(options.rounds):
                for ahead in (0, 1):
                    trainer = prepare(with_overlap(run, ahead, epochs)).trainer
                    rows.append({"epochs": epochs, "overlap": ahead, **_stretch(trainer, options.iterations)})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        server.close()
    summary = []
    for epochs in options.epochs:
        row: dict[str, Any] = {"epochs": epochs}
        for ahead, name in ((0, "off"), (1, "on")):
            mine = [r for r in rows if r["epochs"] == epochs and r["overlap"] == ahead]
            row[f"samples_per_second_{name}"] = statistics.median(r["samples_per_second"] for r in mine)
            row[f"waiting_share_{name}"] = statistics.median(r["waiting_share"] for r in mine)
        summary.append(row)
    return {"iterations": options.iterations, "summary": summary, "rows": rows}


def _stretch(trainer: BiLevelTrainer, iterations: int) -> dict[str, float]:
    if not isinstance(trainer.engine, Prefetch):
        trainer.engine = _Clocked(trainer.engine)
    trainer.engine.update_weights(None, 0)
    trainer.fit_reward_scale()
    times, waits = [], []
    for _ in range(iterations):
        gathered = trainer._gather()
        trainer.policy_step(gathered)
        trainer.reward_step(gathered)
        times.append(time.perf_counter())
        waits.append(trainer.engine.waited)
    trainer.engine.close()
    seconds = times[-1] - times[0]
    samples = (iterations - 1) * trainer.config.prompts_per_step * trainer.config.rollout.n
    return {
        "seconds": round(seconds, 3),
        "samples_per_second": round(samples / seconds, 2),
        "waiting_share": round((waits[-1] - waits[0]) / seconds, 4),
    }


def main() -> int:
    torch.set_num_threads(1)  # the other core is the server's
    options = tyro.extras.subcommand_cli_from_dict({"learning": Learning, "overlap": Overlap, "page": Page})
    if isinstance(options, Page):
        write_page()
        return 0
    figures = learning(options) if isinstance(options, Learning) else overlap(options)
    provenance = _results.provenance(shlex.join(["python", "-m", "bench.rollout", *sys.argv[1:]]))
    options.json.write_text(json.dumps({"provenance": provenance, **figures}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
