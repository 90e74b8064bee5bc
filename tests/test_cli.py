"""The command line: help that shows everything, errors in words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from irlfast.cli import main


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    for name in ("demo", "bilevel", "score", "report", "doctor"):
        assert name in text


def test_help_of_bilevel_shows_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "bilevel")
    for option in (
        "--model",
        "--demonstrations",
        "--resume",
        "--iterations",
        "--policy-steps",
        "--reward-steps",
        "--beta",
        "--rollout.top-p",
        "--rollout.n",
        "--policy.kind",
        "--policy.optimizer.max-grad-norm",
        "--reward.weight-clip",
        "--reward-model.pooling",
        "--data.heldout",
        "--supervised.steps",
    ):
        assert option in text, option


def test_a_bad_value_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bilevel", "--model", "m", "--demonstrations", "d", "--beta", "0"]) == 1
    error = capsys.readouterr().err
    assert "beta = 0.0, expected a number above 0" in error
    assert "Traceback" not in error


def test_python_m_works() -> None:
    done = subprocess.run([sys.executable, "-m", "irlfast.cli", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
