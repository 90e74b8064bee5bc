"""What docs/iq_learn.md shows works as it stands there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "iq_learn.md").read_text(encoding="utf-8")


def test_its_examples_run() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    first, second = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(first, "iq_learn.md", "exec"), names)
    for name in ("nll", "td_error", "reward", "reward_std", "q", "value"):
        assert f"'{name}'" in said.getvalue()
    assert bool(names["weight"].grad.any())
    exec(compile(second, "iq_learn.md", "exec"), names)
    assert names["rewards"].tolist() == [[0.5, 1.0]]
    assert names["returns"].tolist() == [1.5]


def test_its_commands_and_options_exist() -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    shown = [shlex.split(line)[1:] for line in re.findall(r"^    (irlfast .*)$", PAGE, flags=re.MULTILINE)]
    assert [arguments[0] for arguments in shown] == ["data", "iq", "score", "report"]
    for arguments in shown:
        assert callable(tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments))
    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=["iq", "--help"])
    for option in set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - {"--output", "--input", "--reward", "--model", "--help"}:
        assert re.search(rf"{option}\b", help_text.getvalue()), option
