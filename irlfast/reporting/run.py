"""What a run left in its folder, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irlfast.train.checkpoint import latest_checkpoint
from irlfast.train.log import read_log

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's files.

    Args:
        name: of its folder.
        rows: metrics.jsonl, oldest first; each has "kind" and "iteration".
        samples: samples.jsonl (irlfast.train.samples), empty where there is none.
        config: the whole configuration, empty where none was found.
        summary: summary.json, empty while the run goes on.
    """

    name: str
    rows: Rows
    samples: Rows = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Rows:
        """Rows of one kind: "eval", "train", "warmup" or "warning"."""
        return [row for row in self.rows if row["kind"] == kind]


def read_run(folder: Path) -> Run:
    """Read a run, finished or not. A line that is still being written is left out.

    Raises:
        FileNotFoundError: the folder holds no metrics.jsonl.
        ValueError: a file that is not what it should be, named with its line.
    """
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"{log} is missing: give the folder that a run was started with (--out)")
    samples = folder / "samples.jsonl"
    return Run(
        name=folder.resolve().name,
        rows=_rows(log),
        samples=_rows(samples) if samples.is_file() else [],
        config=_config(folder),
        summary=_object(folder / "summary.json"),
    )


def _rows(path: Path) -> Rows:
    try:
        rows = read_log(path)
    except ValueError as cause:
        raise ValueError(f"{path} is not JSON lines: {cause}") from cause
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "iteration" not in row:
            raise ValueError(f'{path}, line {number}: expected an object with "iteration", got {str(row)[:60]}')
    return rows


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json, else what the newest checkpoint says of its trainer."""
    config = _object(folder / "config.json")
    if config or not (folder / "checkpoints").is_dir():
        return config
    newest = latest_checkpoint(folder / "checkpoints")
    return {} if newest is None else _object(newest / "state.json").get("config", {})


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ValueError(f"{path} is not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
