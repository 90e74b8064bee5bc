"""Tracker: what is sent where, and what is said when the package is missing."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from irlfast.train.track import Tracker


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_rows_are_sent_under_their_kind(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    module: Any = types.ModuleType(kind)
    module.init = lambda **options: calls.append(options)
    module.log = lambda values, step: calls.append((values, step))
    module.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, kind, module)
    tracker = Tracker(kind, project="p", folder=tmp_path / "run", config={"lr": 1})
    tracker.write("train", 3, {"nll": 1.5, "name": "x", "bad": float("nan"), "none": None, "count": 2})
    tracker.close()
    assert calls == [
        {"project": "p", "name": "run", "config": {"lr": 1}},
        ({"train/nll": 1.5, "train/count": 2.0}, 3),
        "finish",
    ]


def test_tensorboard_gets_scalars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            calls.append(folder)

        def add_scalar(self, *values: Any) -> None:
            calls.append(values)

        def close(self) -> None:
            calls.append("close")

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = Tracker("tensorboard", project="p", folder=tmp_path, config={})
    tracker.write("eval", 4, {"nll": 1.5})
    tracker.close()
    assert calls == [str(tmp_path / "tensorboard"), ("eval/nll", 1.5, 4), "close"]


@pytest.mark.parametrize("kind", ["trackio", "wandb", "tensorboard"])
def test_a_missing_package_is_an_error_and_not_silence(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(ImportError, match=rf"track = '{kind}' needs the {kind} package"):
        Tracker(kind, project="p", folder=tmp_path, config={})


def test_none_sends_nothing(tmp_path: Path) -> None:
    tracker = Tracker("none", project="p", folder=tmp_path, config={})
    tracker.write("train", 1, {"nll": 1.0})
    tracker.close()
