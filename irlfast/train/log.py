"""The run's record: one JSON object a line in ``metrics.jsonl``, always, and a progress display on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

_L = TypeVar("_L", bound="JsonLines")


class JsonLines:
    """Appends objects to a JSON-lines file, each flushed as it is written. Every object has an "iteration".

    Args:
        path: the file. With `resume_from` None a file that is there is an error, so that no run overwrites another.
        resume_from: on resume, rows of later iterations than this are removed first: they will be made again.
    """

    def __init__(self, path: Path, *, resume_from: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from is None:
            if path.exists():
                raise FileExistsError(f"{path} is there already: choose another --out, or --resume this run")
        elif path.exists():
            kept = [line for line in _complete_lines(path) if json.loads(line)["iteration"] <= resume_from]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; its numbers are finite."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self: _L) -> _L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunLog(JsonLines):
    """A run's metrics, one row of numbers at a time."""

    def __init__(self, path: Path, *, resume_from: int | None = None) -> None:
        super().__init__(path, resume_from=resume_from)
        self._resume_from = resume_from
        self._samples: JsonLines | None = None
        self._start = time.perf_counter()

    @property
    def samples(self) -> JsonLines:
        """``samples.jsonl`` beside the log (irlfast.train.samples), made when it is first asked for."""
        if self._samples is None:
            self._samples = JsonLines(self.path.with_name("samples.jsonl"), resume_from=self._resume_from)
        return self._samples

    def close(self) -> None:
        super().close()
        if self._samples is not None:
            self._samples.close()

    def write(self, kind: str, iteration: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append one row: its kind ("train", "eval"), the iteration, the seconds since this process began, the values.

        A value that is not finite is written as null, which JSON has, rather than NaN, which it lacks.
        """
        row: dict[str, Any] = {"kind": kind, "iteration": iteration}
        row["seconds"] = round(time.perf_counter() - self._start, 3)
        for key, value in values.items():
            number = float(value) if not isinstance(value, (int, str)) else value
            row[key] = None if isinstance(number, float) and not math.isfinite(number) else number
        self.append(row)
        return row


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a log, all or those of one kind."""
    rows = [json.loads(line) for line in _complete_lines(path)]
    return rows if kind is None else [row for row in rows if row["kind"] == kind]


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a process killed while writing leaves a last one that does not."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class Progress:
    """A live progress bar on a terminal; elsewhere one plain line for each evaluation.

    Used as a context manager around the loop. `rich` draws the bar where it is installed.
    """

    def __init__(self, total: int, description: str) -> None:
        self._total = total
        self._description = description
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._bar = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance_to(self, done: int, values: Mapping[str, Any]) -> None:
        """Move the bar to `done` and show a few values beside it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=_short(values))

    def warn(self, text: str) -> None:
        """Say something that a person should act on."""
        line = f"{self._description}: warning: {text}"
        if self._bar is not None:
            self._bar.console.print(line, style="yellow", highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str, values: Mapping[str, Any]) -> None:
        """Say something that stays on the screen: the figures of an evaluation."""
        line = f"{self._description}: {text}: {_short(values)}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _short(values: Mapping[str, Any]) -> str:
    parts = []
    for key, value in values.items():
        parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)
