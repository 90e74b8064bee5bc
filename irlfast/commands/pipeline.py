"""``irlfast pipeline``: tune on a known reward, extract it from samples, tune a fresh model on what was extracted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from irlfast.report import print_comparison, write_json
from irlfast.rollout import SamplingParams
from irlfast.train.checkpoint import latest_checkpoint
from irlfast.train.config import config_dict
from irlfast.train.extraction import ExtractionConfig
from irlfast.train.log import read_log
from irlfast.train.tuning import TuningConfig

from .extract import ExtractCommand, RewardOptions, run_extract
from .pairs import PairsCommand, run_pairs
from .tune import TuneCommand, run_tune


@dataclass(frozen=True, kw_only=True)
class PipelineCommand:
    """Tune a model on a true reward, sample it beside its base, extract the reward, and tune a fresh copy on that.

    A run that was stopped goes on at the step it was in: start it again with the same arguments.
    """

    model: str
    """Folder or hub name of the start, for both tunings; its hidden states are what the reward reads."""
    true_reward: str
    """What the first tuning is on: package.module.function or a sequence classifier."""
    prompts: str
    """JSON lines (.gz too) whose prompts are answered, as for `irlfast tune`."""
    out: Path = Path("runs/pipeline")
    """Folder for tuned/, pairs.jsonl, extracted/, retuned/ and summary.json."""
    tune: TuningConfig = field(default_factory=TuningConfig)
    """Both tunings, but for the second one's weight of the KL."""
    retune_beta: float | None = None
    """Weight of the KL in the second tuning, in units of the extracted reward; by default `--extract.beta`. What
    bradley_terry, maxent and airl extract is that times log(tuned / base) of an answer, so with it the second tuning's
    optimum is the tuned model again. Name one for an objective whose reward has no such unit."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64, n=2))
    """How the tuned model and its base are sampled for the pairs."""
    max_prompts: int = 1000
    """Prompts of the pairs at most."""
    reward: RewardOptions = field(default_factory=RewardOptions)
    """Reward network."""
    extract: ExtractionConfig = field(default_factory=ExtractionConfig)
    """Extraction."""
    seeds: int = 3
    """Rewards extracted from different starts."""
    rival: bool = False
    """Report a TF-IDF rival of the extraction too."""
    prompt_tokens: int = 32
    """Prompt length of plain text, in tokens, BOS included."""
    heldout: int = 128
    """Rows whose prompts evaluate the tunings."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""

    @property
    def retune(self) -> TuningConfig:
        """The second tuning."""
        return replace(self.tune, beta=self.extract.beta if self.retune_beta is None else self.retune_beta)


def run_pipeline(command: PipelineCommand) -> int:
    """Run the steps that are not done yet, and write summary.json."""
    out = command.out
    out.mkdir(parents=True, exist_ok=True)
    _same_configuration(out / "pipeline.json", command)
    steps: tuple[tuple[str, Path, Callable[[], int]], ...] = (
        (
            "tune on the true reward",
            out / "tuned" / "summary.json",
            lambda: _tune(command, "tuned", command.true_reward, command.tune),
        ),
        ("sample both models", out / "pairs.jsonl", lambda: _pairs(command)),
        ("extract the reward", out / "extracted" / "report.json", lambda: _extract(command)),
        (
            "tune a fresh model on the extracted reward",
            out / "retuned" / "summary.json",
            lambda: _tune(command, "retuned", str(out / "extracted" / "reward"), command.retune),
        ),
    )
    for number, (name, product, run) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {name}{' (done before)' if product.exists() else ''}", flush=True)
        if not product.exists():
            run()
    summary = summarize(out)
    write_json(out / "summary.json", summary)
    print_comparison({name: summary[name] for name in ("start", "tuned", "retuned")})
    print(
        f"share of the true reward's gain: {summary['gain_share']:.3f} at the end, "
        f"{summary['gain_share_at_equal_kl']:.3f} at equal KL"
    )
    return 0


def summarize(out: Path) -> dict[str, Any]:
    """The chain's outcome: both tunings, the extraction's test figures, and how much of the gain came back.

    gain_share: (true reward after retuning - at the start) / (after tuning on it - at the start).
    gain_share_at_equal_kl: the same at the largest KL that both runs reached, each interpolated between its own
    evaluations; equal_kl says where.
    """
    runs = {name: read_log(out / name / "metrics.jsonl", "eval") for name in ("tuned", "retuned")}
    start = runs["tuned"][0]["true_reward"]
    gains = {name: rows[-1]["true_reward"] - start for name, rows in runs.items()}
    kl = min(max(row["kl"] for row in rows) for rows in runs.values())
    at_kl = {name: reward_at_kl(rows, kl) - start for name, rows in runs.items()}
    keys = ("iteration", "true_reward", "true_reward_error", "reward_sample", "kl", "length", "repetition")
    shown = {
        "start": runs["tuned"][0],
        "tuned": runs["tuned"][-1],
        "retuned": runs["retuned"][-1],
    }
    return {
        **{name: {key: row[key] for key in keys} for name, row in shown.items()},
        "extraction": _read(out / "extracted" / "report.json")["test"],
        "gain_share": gains["retuned"] / gains["tuned"] if gains["tuned"] else float("nan"),
        "equal_kl": kl,
        "gain_share_at_equal_kl": at_kl["retuned"] / at_kl["tuned"] if at_kl["tuned"] else float("nan"),
    }


def reward_at_kl(rows: list[dict[str, Any]], kl: float) -> float:
    """The true reward of a run where its KL first reached `kl`, linear between evaluations; its last one if never."""
    for before, after in pairwise(rows):
        if before["kl"] <= kl <= after["kl"] and after["kl"] > before["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return float(before["true_reward"] + share * (after["true_reward"] - before["true_reward"]))
    return float(rows[-1]["true_reward"])


def _tune(command: PipelineCommand, name: str, reward: str, config: TuningConfig) -> int:
    folder = command.out / name
    return run_tune(
        TuneCommand(
            model=command.model,
            reward=reward,
            true_reward=command.true_reward,
            prompts=command.prompts,
            out=folder,
            resume=(folder / "metrics.jsonl").exists(),
            prompt_tokens=command.prompt_tokens,
            heldout=command.heldout,
            device=command.device,
            train=config,
        )
    )


def _pairs(command: PipelineCommand) -> int:
    newest = latest_checkpoint(command.out / "tuned" / "checkpoints")
    assert newest is not None
    return run_pairs(
        PairsCommand(
            base=command.model,
            tuned=str(newest / "policy"),
            prompts=Path(command.prompts),
            out=command.out / "pairs.jsonl",
            reward=command.true_reward,
            prompt_tokens=command.prompt_tokens,
            max_prompts=command.max_prompts,
            sampling=command.sampling,
            device=command.device,
            seed=command.tune.seed,
        )
    )


def _extract(command: PipelineCommand) -> int:
    return run_extract(
        ExtractCommand(
            pairs=command.out / "pairs.jsonl",
            model=command.model,
            out=command.out / "extracted",
            seeds=command.seeds,
            rival=command.rival,
            device=command.device,
            reward=command.reward,
            train=replace(command.extract, seed=command.tune.seed),
        )
    )


def _same_configuration(path: Path, command: PipelineCommand) -> None:
    """Keep the configuration, or refuse to go on with another one."""
    given = {**config_dict(command), "out": str(command.out)}
    if not path.exists():
        write_json(path, given)
        return
    saved = _read(path)
    changed = sorted(name for name in given if saved.get(name) != _plain(given[name]))
    if changed:
        raise ValueError(f"{path.parent} was begun with another {', '.join(changed)}: choose another --out")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
