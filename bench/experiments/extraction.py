"""Reward extraction with a known truth, on toxicity labels, and on human preferences.

    python -m bench.experiments.extraction known --data ../shared/data --work runs/extraction
    python -m bench.experiments.extraction toxicity --data ../shared/data --work runs/extraction
    python -m bench.experiments.extraction preferences --data ../shared/data --work runs/extraction
    python -m bench.experiments.extraction_report

`known` runs `irlfast pipeline` for each true reward and seed and adds a line to docs/results/extraction_known.jsonl;
the others run `irlfast extract`. A run that was stopped goes on where it stopped. One core is used.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.experiments.page import RESULTS
from irlfast.commands.extract import ExtractCommand, PreferenceConfig, RewardOptions, run_extract
from irlfast.commands.pipeline import PipelineCommand, run_pipeline
from irlfast.rollout import SamplingParams
from irlfast.train import ExtractionConfig, OptimizerConfig, PolicyConfig, TuningConfig
from irlfast.train.log import read_log

KNOWN = RESULTS / "extraction_known.jsonl"
# Each true reward has its own unit; these take the policy about equally far.
BETA = {"positive_sentences": 0.05, "word_length": 0.1}
TRUE_REWARDS = tuple(BETA)
SEEDS = (0, 1, 2, 3, 4)
TOKENS = 48
REWARD = RewardOptions(layer=2, pooling=("mean", "max"), hidden_sizes=(128,), dropout=0.3)
TRAIN = ExtractionConfig(optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1))
Row = dict[str, Any]


def pipeline(true_reward: str, seed: int, data: Path, work: Path) -> PipelineCommand:
    """The chain on stories260K."""
    return PipelineCommand(
        model=str(data / "models" / "stories260K"),
        prompts=str(data / "text" / "tinystories_1000.jsonl.gz"),
        true_reward=f"irlfast.eval.text_rewards.{true_reward}",
        out=work / f"{true_reward}_{seed}",
        tune=TuningConfig(
            iterations=36,
            prompts_per_step=16,
            beta=BETA[true_reward],
            eval_every=6,
            eval_prompts=256,
            checkpoint_every=36,
            seed=seed,
            rollout=SamplingParams(max_new_tokens=TOKENS, n=8),
            policy=PolicyConfig(kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=1.5e-4, warmup_steps=4)),
        ),
        sampling=SamplingParams(max_new_tokens=TOKENS, n=4),
        max_prompts=744,
        heldout=256,
        reward=replace(REWARD, layer=1, hidden_sizes=(64,)),
        extract=TRAIN,
        seeds=2,
        rival=True,
        device="cpu",
    )


def run_known(data: Path, work: Path, rewards: Sequence[str] = TRUE_REWARDS) -> None:
    done = {(row["true_reward"], row["seed"]) for row in _rows(KNOWN)}
    for seed in SEEDS:
        for name in rewards:
            if (name, seed) in done:
                continue
            command = pipeline(name, seed, data, work)
            run_pipeline(command)
            summary = json.loads((command.out / "summary.json").read_text(encoding="utf-8"))
            extracted = json.loads((command.out / "extracted" / "report.json").read_text(encoding="utf-8"))
            curves = {
                run: [
                    {k: row[k] for k in ("iteration", "kl", "true_reward")}
                    for row in read_log(command.out / run / "metrics.jsonl", "eval")
                ]
                for run in ("tuned", "retuned")
            }
            row = {"true_reward": name, "seed": seed, **summary}
            row |= {"tfidf": extracted["tfidf"], "identifiability": extracted["identifiability"], "curves": curves}
            with KNOWN.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if seed == SEEDS[0]:
                shutil.copy(command.out / "extracted" / "extraction.png", RESULTS / f"extraction_{name}.png")


def run_toxicity(data: Path, work: Path) -> None:
    base = ExtractCommand(
        pairs=data / "toxicity" / "tweets_offensive.jsonl.gz",
        model=str(data / "models" / "stories260K"),
        out=work / "toxicity",
        data=PreferenceConfig(score_field="toxicity", lower_is_better=True, label_threshold=-0.5, pairs_per_text=4),
        reward=REWARD,
        train=TRAIN,
        rival=True,
        also=(f"{data / 'toxicity' / 'comments_surge.jsonl.gz'}:toxic",),
        device="cpu",
    )
    _extract(base, "extraction_toxicity.json")
    shuffled = replace(base, out=work / "toxicity_shuffled", shuffle_labels=True, rival=False, also=(), seeds=8)
    _extract(shuffled, "extraction_toxicity_shuffled.json")


def run_preferences(data: Path, work: Path) -> None:
    files = {
        "hh_rlhf": data / "hh-rlhf" / "harmless-base" / "test.jsonl.gz",
        "qa_feedback": data / "qa-feedback" / "dev_feedback.jsonl.gz",
    }
    for name, path in files.items():
        command = ExtractCommand(
            pairs=path,
            model=str(data / "models" / "stories260K"),
            out=work / name,
            reward=REWARD,
            train=TRAIN,
            rival=True,
            device="cpu",
        )
        _extract(command, f"extraction_{name}.json")


def _extract(command: ExtractCommand, name: str) -> None:
    if (RESULTS / name).exists():
        print(f"{name} is there: left as it is")
        return
    if not (command.out / "report.json").exists():
        run_extract(command)
    report = json.loads((command.out / "report.json").read_text(encoding="utf-8"))
    # Where the files lay says nothing.
    for key in ("pairs", "model", "out", "also"):
        value = report["configuration"][key]
        report["configuration"][key] = [Path(v).name for v in value] if isinstance(value, list) else Path(value).name
    (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("known", "toxicity", "preferences"))
    parser.add_argument("--data", type=Path, required=True, help="folder of real data and models")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rewards", nargs="+", choices=TRUE_REWARDS, default=TRUE_REWARDS, help="of known")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "known":
        run_known(given.data, given.work, given.rewards)
    else:
        {"toxicity": run_toxicity, "preferences": run_preferences}[given.part](given.data, given.work)


if __name__ == "__main__":
    main()
