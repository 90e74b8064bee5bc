"""What the command line offers: a configuration in, an action out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import tyro

from .bilevel import BiLevelCommand, run_bilevel
from .data import DataCommand, run_data
from .demo import DemoCommand, run_demo
from .extract import ExtractCommand, run_extract
from .iq import IQCommand, run_iq
from .pairs import PairsCommand, run_pairs
from .pipeline import PipelineCommand, run_pipeline
from .report import ReportCommand, run_report
from .score import ScoreCommand, run_score
from .tune import TuneCommand, run_tune

Subcommand = Callable[[], int]


def _bilevel(command: Annotated[BiLevelCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Learn a reward from demonstrations while a language model is trained on it."""
    return lambda: run_bilevel(command)


def _demo(command: Annotated[DemoCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Train a small language model on arithmetic and teach it care by inverse RL: about 3 minutes, no file needed."""
    return lambda: run_demo(command)


def _iq(command: Annotated[IQCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Fine-tune a language model from demonstrations by IQ-Learn; its logits then hold a reward for each token."""
    return lambda: run_iq(command)


def _data(command: Annotated[DataCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Write a public data set as a file of prompt/response rows."""
    return lambda: run_data(command)


def _report(command: Annotated[ReportCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Write one self-contained HTML page of a run: curves, warnings, reward histograms, best and worst samples."""
    return lambda: run_report(command)


def _score(command: Annotated[ScoreCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Score new text by a learned reward: raw, normalised, and token by token where the reward model gives that."""
    return lambda: run_score(command)


def _extract(command: Annotated[ExtractCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Learn the reward behind pairs of answers, and say on test pairs how good it is."""
    return lambda: run_extract(command)


def _pairs(command: Annotated[PairsCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Sample a tuned model and its base on the same prompts: the pairs that its reward is extracted from."""
    return lambda: run_pairs(command)


def _pipeline(command: Annotated[PipelineCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Tune on a known reward, extract it from samples, tune a fresh model on what was extracted: the whole chain."""
    return lambda: run_pipeline(command)


def _tune(command: Annotated[TuneCommand, tyro.conf.arg(name="")]) -> Subcommand:
    """Fine-tune a language model on a given reward, held near its start by a KL."""
    return lambda: run_tune(command)


def _doctor() -> Subcommand:
    """Show what was built, which instruction set and devices are there, and which optional packages are missing."""
    from irlfast.doctor import main

    return main


SUBCOMMANDS: dict[str, Callable[..., Subcommand]] = {
    "demo": _demo,
    "bilevel": _bilevel,
    "iq": _iq,
    "data": _data,
    "report": _report,
    "score": _score,
    "tune": _tune,
    "pairs": _pairs,
    "extract": _extract,
    "pipeline": _pipeline,
    "doctor": _doctor,
}
