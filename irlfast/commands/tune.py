"""``irlfast tune``: RL fine-tuning of a language model with a given reward, beside a true one where there is one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from irlfast.data import DataError, Demonstration, load_demonstrations, split, tokenize_demonstrations
from irlfast.report import plot_curves, print_comparison, write_json
from irlfast.rewards import TextReward, TextRewardConfig, TextRewardModel, load_text_reward
from irlfast.scorer import RewardScorer, find_reward
from irlfast.train.config import require
from irlfast.train.log import read_log
from irlfast.train.seeds import derive_seed
from irlfast.train.tuning import TuningConfig, TuningTrainer

from .language_model import LanguageModel, load_language_model, pick_device


@dataclass(frozen=True, kw_only=True)
class TuneCommand:
    """Fine-tune a language model on a reward, held near its start by a KL."""

    model: str
    """Folder or hub name of a causal language model, the start and the KL's reference."""
    reward: str
    """What it is tuned on: package.module.function, called with prompts and responses; the folder of a reward of
    irlfast (or of a run that learned one); or the folder or hub name of a sequence classifier with one label."""
    prompts: str
    """JSON lines (.gz too) with {"prompt", "response"}, {"messages"} or {"text"} rows, or a dataset's hub name. The
    responses are only compared with."""
    true_reward: str | None = None
    """A reward, by the same names, that is evaluated beside it and never trained on."""
    out: Path = Path("runs/tune")
    """Folder for metrics.jsonl, summary.json, curves.png and checkpoints/, whose policy/ loads with transformers."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    prompt_tokens: int = 32
    """Prompt length of plain text, in tokens, BOS included."""
    heldout: int = 128
    """Rows whose prompts are kept apart for evaluation."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and arithmetic of the language model; statistics and losses are float32 either way."""
    train: Annotated[TuningConfig, tyro.conf.arg(name="")] = field(default_factory=TuningConfig)
    """Training."""

    def __post_init__(self) -> None:
        require(self.heldout >= 1, "heldout", self.heldout, "at least 1 row")


def run_tune(command: TuneCommand) -> int:
    """Tune, evaluate, and write the results below `command.out`."""
    logging.basicConfig(level=logging.WARNING, format="irlfast: %(message)s")
    if not command.resume and (command.out / "metrics.jsonl").exists():
        raise FileExistsError(f"{command.out} holds an earlier run: choose another --out, or --resume that one")
    language_model = load_language_model(command.model, device=command.device, dtype=command.dtype)
    reward = text_reward_model(command.reward, language_model, command.device)
    true_reward = None
    if command.true_reward is not None:
        true_reward = text_reward_model(command.true_reward, language_model, command.device)
    rows = load_demonstrations(command.prompts)
    rest, apart = split(rows, heldout_count=command.heldout, seed=derive_seed(command.train.seed, "held-out rows", 0))
    training, heldout = (
        tokenize_demonstrations(
            part,
            language_model.tokenizer,
            max_response_tokens=command.train.rollout.max_new_tokens,
            prompt_tokens=command.prompt_tokens,
        )
        for part in (rest, apart)
    )
    unseen = {row.prompt_ids for row in heldout}
    trainer = TuningTrainer(
        policy=language_model.model,
        engine=language_model.engine(),
        reward=reward,
        true_reward=true_reward,
        demonstrations=[row for row in training if row.prompt_ids not in unseen],
        heldout=heldout,
        config=command.train,
        pad_token_id=language_model.pad_token_id,
        out=command.out,
        reference=copy.deepcopy(language_model.model),
        extra_state=language_model.tokenizer.save_pretrained,
    )
    if command.resume and (command.out / "checkpoints").exists():
        trainer.resume()
    trainer.train()
    results = read_log(command.out / "metrics.jsonl", "eval")
    columns = {"start": results[0], "tuned": results[-1]}
    summary = {name: {k: v for k, v in row.items() if k != "kind"} for name, row in columns.items()}
    write_json(command.out / "summary.json", summary)
    plot_curves(command.out / "metrics.jsonl", command.out / "curves.png")
    print_comparison(summary)
    print(f"Results are in {command.out}")
    return 0


def text_reward_model(name: str, language_model: LanguageModel, device: str) -> TextRewardModel:
    """The reward that a name stands for, as a function of text."""
    function = _saved_reward(name, device) if _is_saved_reward(Path(name)) else load_text_reward(name)
    return TextRewardModel(TextRewardConfig(name=name), function=function, tokenizer=language_model.tokenizer)


def _is_saved_reward(folder: Path) -> bool:
    """A reward of irlfast, a checkpoint or a run, and not a classifier of transformers."""
    if not folder.is_dir():
        return False
    try:
        found = find_reward(folder)
    except FileNotFoundError:
        return False
    return "irlfast_version" in json.loads((found / "config.json").read_text(encoding="utf-8"))


def _saved_reward(name: str, device: str) -> TextReward:
    """A reward of irlfast, raw: the trainer's normaliser rescales what it serves, which keeps the order."""
    scorer = RewardScorer.from_pretrained(name, device=pick_device(device))

    def rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        rows = [Demonstration(prompt=p, response=r) for p, r in zip(prompts, responses, strict=True)]
        found = []
        for score in scorer.score(rows, empty_responses=True):
            if isinstance(score, DataError):
                raise score
            found.append(score.reward)
        return found

    return rewards
