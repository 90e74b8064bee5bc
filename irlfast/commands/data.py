"""``irlfast data``: public data sets as files of prompt/response rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from irlfast.data.gsm8k import HUB_NAME, gsm8k_rows, write_rows


@dataclass(frozen=True, kw_only=True)
class DataCommand:
    """Write a data set as JSON lines of {"prompt", "response"}, which every training command reads."""

    dataset: Annotated[Literal["gsm8k"], tyro.conf.Positional]
    """Which: gsm8k, grade-school mathematics with worked answers."""
    output: Path
    """File to write."""
    source: str = HUB_NAME
    """A JSON-lines file (.gz too) as published, or the data set's hub name."""
    split: str = "train"
    """Split of the hub's data set; of no meaning for a file."""
    calculations: bool = False
    """Keep the marks <<48/2=24>> that GSM8K's answers have for a calculator."""
    limit: int | None = None
    """Read so many rows at most."""


def run_data(command: DataCommand) -> int:
    """Read, check and write the rows, and say how many there are."""
    rows = gsm8k_rows(command.source, split=command.split, calculations=command.calculations, limit=command.limit)
    write_rows(rows, command.output)
    print(f"{len(rows)} rows are in {command.output}")
    return 0
