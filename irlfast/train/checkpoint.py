"""Checkpoints that are whole or absent: written beside, flushed to disk, renamed, and only then named by ``latest``.

Layout of a checkpoint folder::

    checkpoints/
      latest                    text file: the name of the newest complete checkpoint
      step-40/                  one folder a checkpoint
        ...                     what the writer callback put there

A run killed at any point leaves at most a ``step-N.tmp`` folder, which the next write of that step removes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"step-(\d+)")


def write_checkpoint(folder: Path, step: int, writer: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint `step` through `writer(path)` and drop all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder; made where absent.
        step: number of the checkpoint.
        writer: puts every file of the checkpoint below the path that it is given.
        keep: how many of the newest checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    temporary = folder / f"step-{step}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    writer(temporary)
    for path in sorted(temporary.rglob("*")):
        _sync(path)
    _sync(temporary)
    if final.exists():  # a resumed run reached a step that an earlier, later-killed run had written
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    pointer = folder / "latest.tmp"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _sync(pointer)
    os.replace(pointer, folder / "latest")
    _sync(folder)
    # Later steps are leftovers of a run killed before `latest` named them: they must not push this one out.
    for old in sorted(n for n in _complete(folder) if n <= step)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None where the folder holds none.

    Raises:
        FileNotFoundError: ``latest`` names a folder that is not there.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = folder / name
    if _NAME.fullmatch(name) is None or not path.is_dir():
        have = ", ".join(f"step-{n}" for n in sorted(_complete(folder))) or "none"
        raise FileNotFoundError(f"{pointer} names {name!r}, which is not a checkpoint here (complete ones: {have})")
    return path


def checkpoint_step(path: Path) -> int:
    """The step number in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not a checkpoint name, expected step-N")
    return int(match.group(1))


def _complete(folder: Path) -> list[int]:
    matches = (_NAME.fullmatch(p.name) for p in folder.iterdir() if p.is_dir())
    return [int(m.group(1)) for m in matches if m is not None]


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened for that on Windows, where rename is enough."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
