"""Checkpoints are whole or absent, whatever call the process dies in."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irlfast.train import checkpoint
from irlfast.train.checkpoint import (
    MANIFEST,
    DamagedCheckpointError,
    checkpoint_step,
    latest_checkpoint,
    verify_checkpoint,
    whole_checkpoint,
    write_checkpoint,
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs after it may be relied upon."""


def writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "policy").mkdir()
        (path / "policy" / "weights").write_text(text)
        (path / "state.json").write_text(text)

    return write


def contents(path: Path) -> set[str]:
    return {file.read_text() for file in path.rglob("*") if file.is_file() and file.name != MANIFEST}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_written_named_and_found(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "checkpoints"
    path = write_checkpoint(folder, 7, writer("seven"), keep=2)
    assert path == folder / "step-7" == latest_checkpoint(folder)
    assert contents(path) == {"seven"}
    assert checkpoint_step(path) == 7
    assert names(folder) == ["latest", "step-7"]
    assert (folder / "latest").read_text() == "step-7\n"


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, step, writer(str(step)), keep=2)
    assert names(tmp_path) == ["latest", "step-10", "step-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-11"


def test_a_writer_that_raises_leaves_the_older_checkpoint_and_latest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, writer("one"), keep=1)

    def broken(path: Path) -> None:
        (path / "half").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, 2, broken, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1"
    assert contents(tmp_path / "step-1") == {"one"}
    assert not (tmp_path / "step-2").exists()

    write_checkpoint(tmp_path, 2, writer("two"), keep=1)  # replaces the leftover step-2.tmp
    assert names(tmp_path) == ["latest", "step-2"]
    assert names(tmp_path / "step-2") == ["manifest.json", "policy", "state.json"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_killed_in_any_call_resumes_from_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """Steps 1 to 3, dying in the n-th call that changes or flushes the disk, for every n; then a second run goes on."""
    calls = 0

    def counted(real: Callable[..., Any], dies_at: int, after: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == dies_at and not after:
                raise Killed
            result = real(*args, **options)
            if calls == dies_at:
                raise Killed
            return result

        return call

    def run(folder: Path, first: int, dies_at: int = 0, after: bool = False) -> None:
        nonlocal calls
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpoint.os, "fsync", counted(lambda handle: None, dies_at, after)
            )  # slow, and no effect here
            patch.setattr(checkpoint.os, "replace", counted(os.replace, dies_at, after))
            patch.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree, dies_at, after))
            for step in range(first, 4):
                write_checkpoint(folder, step, writer(f"{step}"), keep=keep)

    run(tmp_path / "whole", 1)
    total = calls
    assert total >= 3 * 8
    for dies_at in range(1, total + 1):
        for after in (False, True):
            folder = tmp_path / f"{dies_at}-{after}"
            with pytest.raises(Killed):
                run(folder, 1, dies_at, after)
            path = latest_checkpoint(folder)
            reached = 0 if path is None else checkpoint_step(path)
            if path is not None:
                assert contents(path) == {f"{reached}"}
                assert names(path) == ["manifest.json", "policy", "state.json"]
                verify_checkpoint(path)
            if reached == 3:  # died with the last step done; an older one may still lie about
                continue
            run(folder, reached + 1)
            expected = ["latest", *(f"step-{step}" for step in range(4 - keep, 4))]
            assert [name for name in names(folder) if not name.endswith(".tmp")] == expected
            assert contents(folder / "step-3") == {"3"}


def test_leftovers_of_later_steps_do_not_push_out_the_checkpoint_just_written(tmp_path: Path) -> None:
    """A run killed between the two renames leaves step-60 that `latest` does not name; the next may write step-45."""
    write_checkpoint(tmp_path, 40, writer("40"), keep=1)
    shutil.copytree(tmp_path / "step-40", tmp_path / "step-60")
    write_checkpoint(tmp_path, 45, writer("45"), keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-45"
    assert contents(tmp_path / "step-45") == {"45"}
    write_checkpoint(tmp_path, 60, writer("60"), keep=1)
    assert names(tmp_path) == ["latest", "step-60"]
    assert contents(tmp_path / "step-60") == {"60"}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-3.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("named", ["step-9", "step-5.tmp", "../step-5", ""])
def test_latest_that_names_no_checkpoint_is_an_error_that_lists_those_there(tmp_path: Path, named: str) -> None:
    write_checkpoint(tmp_path, 5, writer("five"), keep=3)
    write_checkpoint(tmp_path, 12, writer("twelve"), keep=3)
    (tmp_path / "step-5.tmp").mkdir()
    (tmp_path / "latest").write_text(named + "\n")
    with pytest.raises(FileNotFoundError) as error:
        latest_checkpoint(tmp_path)
    there = "(complete ones: step-5, step-12)"
    assert str(error.value) == f"{tmp_path / 'latest'} names {named!r}, which is not a checkpoint here {there}"


def test_every_file_is_flushed_before_the_rename_and_latest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a power cut could leave a complete-looking checkpoint of empty files."""
    events: list[str] = []
    sync, replace = checkpoint._sync, os.replace

    def noted_sync(path: Path) -> None:
        events.append(f"sync {path.relative_to(tmp_path)}")
        sync(path)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"replace {target.relative_to(tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(checkpoint, "_sync", noted_sync)
    monkeypatch.setattr(checkpoint.os, "replace", noted_replace)
    write_checkpoint(tmp_path, 3, writer("three"), keep=1)
    assert events == [
        "sync step-3.tmp/manifest.json",
        "sync step-3.tmp/policy",
        "sync step-3.tmp/policy/weights",
        "sync step-3.tmp/state.json",
        "sync step-3.tmp",
        "replace step-3",
        "sync .",
        "sync latest.tmp",
        "replace latest",
        "sync .",
    ]


def test_checkpoint_step_wants_a_checkpoint_name() -> None:
    with pytest.raises(ValueError, match=r"'step-3\.tmp' is not a checkpoint name, expected step-N"):
        checkpoint_step(Path("runs/step-3.tmp"))


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("policy/weights", cut, r"policy/weights has 2 bytes, 3 were written"),
        ("policy/weights", flip, r"policy/weights has other content than was written \(SHA-256 differs\)"),
        ("state.json", cut, r"state\.json has 2 bytes, 3 were written"),
        ("state.json", Path.unlink, r"state\.json is missing"),
        (MANIFEST, Path.unlink, r"manifest\.json is missing"),
        (MANIFEST, lambda path: path.write_text("{"), r"manifest\.json cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"files": {"state.json": {}}}'), r"manifest\.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    for step in (9, 10, 11):
        write_checkpoint(tmp_path, step, writer(f"{step:03d}"), keep=5)
    damage(tmp_path / "step-11" / name)
    with pytest.raises(DamagedCheckpointError, match=message):
        verify_checkpoint(tmp_path / "step-11")
    assert whole_checkpoint(tmp_path) == tmp_path / "step-10"
    said = "\n".join(caplog.messages)
    assert f"damaged checkpoint refused: {tmp_path / 'step-11' / name}" in said
    assert f"using {tmp_path / 'step-10'}, the newest whole checkpoint, instead of step-11" in said
    cut(tmp_path / "step-10" / "state.json")
    assert whole_checkpoint(tmp_path) == tmp_path / "step-9"
    cut(tmp_path / "step-9" / "state.json")
    with pytest.raises(DamagedCheckpointError, match=r"no whole checkpoint in .*step-11.*step-10.*step-9"):
        whole_checkpoint(tmp_path)


def test_whole_checkpoints_are_used_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert whole_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 3, writer("three"), keep=2)
    assert whole_checkpoint(tmp_path) == tmp_path / "step-3"
    assert not caplog.messages


def test_a_later_step_that_latest_does_not_name_is_not_taken(tmp_path: Path) -> None:
    """Left by a run killed between the two renames: whole, but not what the run had said."""
    write_checkpoint(tmp_path, 3, writer("three"), keep=2)
    shutil.copytree(tmp_path / "step-3", tmp_path / "step-9")
    assert whole_checkpoint(tmp_path) == tmp_path / "step-3"
