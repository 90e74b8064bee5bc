"""Checkpoints that are whole or absent: written beside, flushed to disk, renamed, and only then named by ``latest``.

Layout of a checkpoint folder::

    checkpoints/
      latest                    text file: the name of the newest complete checkpoint
      step-40/                  one folder a checkpoint
        manifest.json           size and SHA-256 of every other file
        ...                     what the writer callback put there

A run killed at any point leaves at most a ``step-N.tmp`` folder, which the next write of that step removes. What a disk
or a copy damages later the manifest tells: such a checkpoint is refused by name, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d+)")
_log = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those that were written; the message names the file and what is wrong."""


def write_checkpoint(folder: Path, step: int, writer: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint `step` through `writer(path)` and drop all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder; made where absent.
        step: number of the checkpoint.
        writer: puts every file of the checkpoint below the path that it is given.
        keep: how many of the newest checkpoints stay.
    """
    final = folder / f"step-{step}"
    write_whole(final, writer)
    pointer = folder / "latest.tmp"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _sync(pointer)
    os.replace(pointer, folder / "latest")
    _sync(folder)
    # Later steps are leftovers of a run killed before `latest` named them: they must not push this one out.
    for old in sorted(n for n in _complete(folder) if n <= step)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return final


def write_whole(final: Path, writer: Callable[[Path], None]) -> None:
    """Make the folder `final` from what `writer(path)` puts below its path, with a manifest; whole or not at all."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(final.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    writer(temporary)
    _write_manifest(temporary)
    for path in sorted(temporary.rglob("*")):
        _sync(path)
    _sync(temporary)
    if final.exists():  # a resumed run reached a step that an earlier, later-killed run had written
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(final.parent)


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


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None where the folder holds none.

    One that is damaged is named in a warning of the log, and the one before it is looked at.

    Raises:
        FileNotFoundError: ``latest`` names a folder that is not there.
        DamagedCheckpointError: there are checkpoints, and all are damaged.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        return None
    older = sorted((n for n in _complete(folder) if n < checkpoint_step(newest)), reverse=True)
    damage = []
    for path in [newest, *(folder / f"step-{n}" for n in older)]:
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            _log.warning("damaged checkpoint refused: %s", error)
            damage.append(str(error))
            continue
        if path != newest:
            _log.warning("using %s, the newest whole checkpoint, instead of %s", path, newest.name)
        return path
    raise DamagedCheckpointError(f"no whole checkpoint in {folder}: " + "; ".join(damage))


def verify_checkpoint(path: Path, *, under: str = "") -> None:
    """Compare every file that the checkpoint's manifest lists with its size and digest.

    Args:
        path: the checkpoint's folder.
        under: leave out files whose path in the checkpoint does not begin so.

    Raises:
        DamagedCheckpointError: the first file that is missing, of another size or of other content, or no manifest.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path / MANIFEST} is missing: nothing tells whether the rest is whole") from None
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise DamagedCheckpointError(f"{path / MANIFEST} cannot be read ({cause!r})") from cause
    for name, (size, digest) in expected.items():
        if not name.startswith(under):
            continue
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{file} is missing")
        found = file.stat().st_size
        if found != size:
            raise DamagedCheckpointError(f"{file} has {found} bytes, {size} were written")
        if _digest(file) != digest:
            raise DamagedCheckpointError(f"{file} has other content than was written (SHA-256 differs)")


def checkpoint_step(path: Path) -> int:
    """The step number in a checkpoint's folder name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not a checkpoint name, expected step-N")
    return int(match.group(1))


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
