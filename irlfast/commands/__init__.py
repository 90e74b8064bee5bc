"""What the command line offers: a configuration in, an action out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

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
from .serve_reward import ServeRewardCommand, run_serve_reward
from .tune import TuneCommand, run_tune

Subcommand = Callable[[], int]


def _subcommand(configuration: type[Any], run: Callable[[Any], int]) -> Callable[..., Subcommand]:
    """From the options of a configuration class, whose docstring says what the command does, to the action."""

    def make(command: Any) -> Subcommand:
        return lambda: run(command)

    make.__doc__ = configuration.__doc__
    make.__annotations__ = {"command": Annotated[configuration, tyro.conf.arg(name="")], "return": Subcommand}
    return make


def _doctor() -> Subcommand:
    """Show what was built, which instruction set and devices are there, and which optional packages are missing."""
    from irlfast.doctor import main

    return main


SUBCOMMANDS: dict[str, Callable[..., Subcommand]] = {
    "demo": _subcommand(DemoCommand, run_demo),
    "bilevel": _subcommand(BiLevelCommand, run_bilevel),
    "iq": _subcommand(IQCommand, run_iq),
    "data": _subcommand(DataCommand, run_data),
    "report": _subcommand(ReportCommand, run_report),
    "score": _subcommand(ScoreCommand, run_score),
    "serve-reward": _subcommand(ServeRewardCommand, run_serve_reward),
    "tune": _subcommand(TuneCommand, run_tune),
    "pairs": _subcommand(PairsCommand, run_pairs),
    "extract": _subcommand(ExtractCommand, run_extract),
    "pipeline": _subcommand(PipelineCommand, run_pipeline),
    "doctor": _doctor,
}
