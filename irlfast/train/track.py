"""A run's rows sent to an experiment tracker as well. metrics.jsonl is written whatever this does."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Track = Literal["none", "trackio", "wandb", "tensorboard"]


class Tracker:
    """Sends rows of numbers to trackio, wandb or tensorboard; "none" sends nothing.

    Args:
        kind: which.
        project: name of the project there; for tensorboard of no meaning.
        folder: where tensorboard writes its events, below which the run lies.
        config: the run's configuration, shown beside it.

    Raises:
        ImportError: its package is not installed; nothing was started then.
    """

    def __init__(self, kind: Track, *, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.kind = kind
        if kind == "none":
            return
        name = "torch.utils.tensorboard" if kind == "tensorboard" else kind
        try:
            module = importlib.import_module(name)
        except ImportError as cause:
            raise ImportError(
                f"track = {kind!r} needs the {kind} package: pip install {kind}, or track = 'none'"
            ) from cause
        if kind == "tensorboard":
            self._sink: Any = module.SummaryWriter(str(folder / "tensorboard"))
        else:
            self._sink = module
            module.init(project=project, name=folder.name, config=dict(config))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers of one row under "kind/name"."""
        if self.kind == "none":
            return
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        if self.kind == "tensorboard":
            for name, value in numbers.items():
                self._sink.add_scalar(name, value, step)
        else:
            self._sink.log(numbers, step=step)

    def close(self) -> None:
        """End the run there."""
        if self.kind == "tensorboard":
            self._sink.close()
        elif self.kind != "none":
            self._sink.finish()
