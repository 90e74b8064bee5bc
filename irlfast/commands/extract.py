"""``irlfast extract``: learn the reward behind pairs of answers, and say on test pairs alone how good it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from irlfast.data import Preference, Splits, load_preferences
from irlfast.data.preference_rows import SPLITS
from irlfast.eval.tfidf import TfidfReward
from irlfast.report import print_comparison, write_json
from irlfast.rewards import ReaderConfig, RewardModel, RewardModelConfig
from irlfast.rewards.reader import weights_digest
from irlfast.train.answers import Answers, ReadingConfig, read_answers
from irlfast.train.config import require
from irlfast.train.extraction import ExtractionConfig, ExtractionTrainer, score_answers, shuffled_pairs
from irlfast.train.extraction_plots import plot_extraction
from irlfast.train.extraction_report import HeldOut, identifiability, ranking_report
from irlfast.train.seeds import derive_seed

from .language_model import load_language_model


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How the rows are read."""

    score_field: str | None = None
    """Name of the score of {"text", SCORE} or {"prompt", "response", SCORE} rows, which are then paired."""
    lower_is_better: bool = False
    """Prefer the lower score, as of toxicity; scores are negated, so that higher is better in every figure."""
    pairs_per_text: int = 1
    """Partners drawn for each scored text of the train split; in the others it is one."""
    min_gap: float = 0.0
    """Least difference of two scores that makes a pair."""
    label_threshold: float | None = None
    """For AUC and F1 an answer is positive where its score (negated, where lower is better) is at least this; by
    default where it was chosen."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test; rows of one prompt stay together."""
    limit: int | None = None
    """Read so many rows at most."""


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The reward network."""

    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of its hidden layers; none makes the reward linear."""
    pooling: tuple[Literal["last", "mean", "max"], ...] = ("mean", "max")
    """How the states of an answer's tokens become one vector; several are put side by side."""
    dropout: float = 0.0
    """Dropout after each hidden layer while it is trained."""
    layer: int = -1
    """Which of the language model's hidden states it reads; -1 is the last, after the norm."""
    token_statistics: bool = True
    """Also read each token's log-prob and entropy under the language model."""


@dataclass(frozen=True, kw_only=True)
class ExtractCommand:
    """Learn a reward from pairs: of a tuned model and its base (`irlfast pairs`), or what people preferred."""

    pairs: Path
    """JSON lines (.gz too): rows of `irlfast pairs`, {"prompt", "chosen", "rejected"}, hh-rlhf dialogues, candidates
    with preferences, or scored texts (--data.score-field)."""
    model: str
    """Folder or hub name of the causal language model whose hidden states the reward reads. For maxent and airl it has
    to be the base, which drew the rejected answers."""
    out: Path = Path("runs/extract")
    """Folder for reward/, report.json, scores.jsonl and extraction.png; must not hold an earlier run."""
    seeds: int = 3
    """Rewards to train, from different starts; the one that ranks validation pairs best is saved, and how far they
    agree is reported."""
    rival: bool = False
    """Also report a logistic regression on TF-IDF weights, learned from the same pairs (scikit-learn)."""
    shuffle_labels: bool = False
    """Learn from, and choose by, pairs turned round at random, anew for each seed: a check that must end at chance, in
    the mean over seeds. (One reward learned from noise points somewhere, and the truth may point there too.)"""
    also: tuple[str, ...] = ()
    """Further files to report on without training on them, FILE or FILE:SCORE_FIELD: a tenth of their rows fits the
    threshold of F1, the others are test rows."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Reading of the rows."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """Cutting of the answers."""
    reward: RewardOptions = field(default_factory=RewardOptions)
    """Reward network."""
    train: Annotated[ExtractionConfig, tyro.conf.arg(name="")] = field(default_factory=ExtractionConfig)
    """Training; `seed` is the first of the seeds."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", self.seeds, "at least 1")


def run_extract(command: ExtractCommand) -> int:
    """Train, report on test pairs, and write the results below `command.out`."""
    logging.basicConfig(level=logging.WARNING, format="irlfast: %(message)s")
    if (command.out / "report.json").exists():
        raise FileExistsError(f"{command.out} holds an earlier run: choose another --out")
    data = command.data
    splits = _load(command, str(command.pairs), data.score_field, data.fractions)
    others = {entry: _load(command, *_file_and_field(entry), (0.01, 0.09, 0.9)) for entry in command.also}
    reader = _Reader(command)
    answers = reader.read(splits)
    rewards = _train(command, answers, splits, reader)
    best = max(rewards, key=lambda run: run.accuracy)
    command.out.mkdir(parents=True, exist_ok=True)
    best.trainer.reward.save_pretrained(command.out / "reward")

    test, heldout = _held_out(command, answers, splits)
    scores = [run.trainer.scores() for run in rewards]
    reports = [ranking_report(s, heldout) for s in scores]
    at = rewards.index(best)
    _write_scores(command.out / "scores.jsonl", answers, test, scores[at])
    plot_extraction(command.out / "extraction.png", scores[at], heldout, [run.trainer.history for run in rewards])
    result: dict[str, Any] = {
        "pairs": {name: len(answers.pairs(getattr(splits, name))[1]) for name in SPLITS},
        "dropped_pairs": sum(
            len(getattr(splits, name)) - len(answers.pairs(getattr(splits, name))[1]) for name in SPLITS
        ),
        "seed": best.trainer.config.seed,
        "validation_accuracy": best.accuracy,
        "test": reports[at],
        "seeds": [{"seed": run.trainer.config.seed, **row} for run, row in zip(rewards, reports, strict=True)],
        "identifiability": identifiability(scores, heldout.pairs),
        "configuration": json.loads(json.dumps(asdict(command), default=str)),
    }
    columns = {command.train.objective: reports[at]}
    rival = _rival(splits) if command.rival else None
    if rival is not None:
        result["tfidf"] = ranking_report(_rival_scores(rival, answers), heldout)
        columns["tf-idf"] = result["tfidf"]
    for entry, rows in others.items():
        name = Path(entry).name.split(".")[0]
        told = reader.read(rows)
        _, unseen = _held_out(command, told, rows)
        found = {command.train.objective: ranking_report(score_answers(best.trainer.reward, told), unseen)}
        if rival is not None:
            found["tf-idf"] = ranking_report(_rival_scores(rival, told), unseen)
        result.setdefault("also", {})[name] = found
        columns |= {f"{key}: {name}"[:15]: value for key, value in found.items()}
    write_json(command.out / "report.json", result)
    print_comparison(columns)
    print(f"Results are in {command.out}")
    return 0


class _Reader:
    """The frozen language model."""

    def __init__(self, command: ExtractCommand) -> None:
        loaded = load_language_model(command.model, device=command.device)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._command = command
        options = command.reward
        self.source = ReaderConfig(
            model=command.model,
            layer=options.layer,
            token_statistics=options.token_statistics,
            weights=weights_digest(self._model),
        )
        self.width = self.source.width(self._model.config.get_text_config().hidden_size)

    def read(self, splits: Splits[Preference]) -> Answers:
        rows = [row for name in SPLITS for row in getattr(splits, name)]
        command = self._command
        return read_answers(
            self._model, self._tokenizer, rows, self.source, pooling=command.reward.pooling, config=command.reading
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A trained reward and the accuracy that chose its weights."""

    trainer: ExtractionTrainer
    accuracy: float


def _train(command: ExtractCommand, answers: Answers, splits: Splits[Preference], reader: _Reader) -> list[_Run]:
    """One reward a seed."""
    known = [answers.pairs(rows)[0] for rows in (splits.train, splits.validation)]
    options, runs = command.reward, []
    for seed in range(command.train.seed, command.train.seed + command.seeds):
        # Validation pairs are shuffled too: the pass that is kept would otherwise be chosen by true labels.
        train, validation = (shuffled_pairs(pairs, seed) for pairs in known) if command.shuffle_labels else known
        torch.manual_seed(derive_seed(seed, "reward", 0))
        reward = RewardModel(
            RewardModelConfig(
                hidden_size=reader.width,
                hidden_sizes=options.hidden_sizes,
                pooling=options.pooling,
                dropout=options.dropout,
            )
        )
        reward.source = reader.source
        trainer = ExtractionTrainer(reward, answers, train, validation, replace(command.train, seed=seed))
        runs.append(_Run(trainer=trainer, accuracy=trainer.train().validation_accuracy))
    return runs


def _held_out(
    command: ExtractCommand, answers: Answers, splits: Splits[Preference]
) -> tuple[list[Preference], HeldOut]:
    """The test rows, and what they are judged by."""
    test = answers.pairs(splits.test)
    validation = answers.pairs(splits.validation)
    return test[1], HeldOut.of(answers, test, validation, command.data.label_threshold)


def _file_and_field(entry: str) -> tuple[str, str | None]:
    """ "FILE" or "FILE:FIELD"."""
    path, colon, field_ = entry.rpartition(":")
    return (path, field_) if colon and not Path(entry).exists() else (entry, None)


def _load(
    command: ExtractCommand, path: str, score_field: str | None, fractions: tuple[float, float, float]
) -> Splits[Preference]:
    data = command.data
    return load_preferences(
        path,
        score_field=score_field,
        lower_is_better=data.lower_is_better,
        pairs_per_text=data.pairs_per_text,
        min_gap=data.min_gap,
        fractions=fractions,
        limit=data.limit,
        seed=command.train.seed,
    )


def _rival(splits: Splits[Preference]) -> TfidfReward:
    return TfidfReward(splits.train, splits.validation)


def _rival_scores(rival: TfidfReward, answers: Answers) -> torch.Tensor:
    texts = sorted(answers.rows, key=answers.rows.__getitem__)
    return torch.from_numpy(rival.scores([text for _, text in texts]))


def _write_scores(path: Path, answers: Answers, rows: Sequence[Preference], scores: torch.Tensor) -> None:
    """Test pairs with their learned rewards, a line each."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            pair = {
                "prompt": row.prompt,
                "chosen": row.chosen,
                "rejected": row.rejected,
                "chosen_reward": float(scores[answers.rows[row.prompt, row.chosen]]),
                "rejected_reward": float(scores[answers.rows[row.prompt, row.rejected]]),
                "chosen_score": row.chosen_score,
                "rejected_score": row.rejected_score,
            }
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
