"""What README.md shows works as it stands there."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.data import load_demonstrations

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of a program in the shell blocks."""
    parts = [part for block in blocks("bash") for line in block.splitlines() for part in line.split(" && ")]
    return [words[1:] for words in map(shlex.split, parts) if words[0] == program]


def test_the_training_loop_runs_and_trains() -> None:
    torch.manual_seed(0)
    (example,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logprob"].shape == names["entropy"].shape == names["lse"].shape == (8, 32)
    logits = names["model"](names["tokens"][:, :-1])
    after = torch.distributions.Categorical(logits=logits).log_prob(names["tokens"][:, 1:])
    change = (after - names["logprob"]).mean(dim=1).detach()
    assert change[names["advantages"] > 0].mean() > change[names["advantages"] < 0].mean()


def test_demonstrations_have_the_forms_it_shows(tmp_path: Path) -> None:
    (example,) = blocks("json")
    file = tmp_path / "demonstrations.jsonl"
    file.write_text(example)
    rows = load_demonstrations(str(file))
    assert len(rows) == len(example.splitlines()) == 3
    assert rows[0].prompt == json.loads(example.splitlines()[0])["prompt"]
    assert rows[1].response == "4"
    assert rows[2].is_text


def test_its_commands_are_understood_by_the_command_line() -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    shown = commands(".venv/bin/irlfast")
    assert {arguments[0] for arguments in shown} == {"demo", "bilevel"}
    for arguments in shown:
        with contextlib.redirect_stderr(io.StringIO()) as problem:
            try:
                action = tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments)
            except SystemExit:
                pytest.fail(f"irlfast {shlex.join(arguments)}: {problem.getvalue()}")
        assert callable(action)


def test_the_options_it_names_exist() -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit) as stopped:
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=["bilevel", "--help"])
    assert stopped.value.code == 0
    named = re.findall(r"`(--[a-z-]+)`", README)
    assert named
    for option in named:
        assert re.search(rf"{option}\b", help_text.getvalue()), option


def test_each_benchmark_it_names_exists() -> None:
    shown = [arguments[2] for arguments in commands(".venv/bin/python") if arguments[:2] == ["-m", "bench"]]
    assert shown
    for op in shown:
        assert op == "all" or (ROOT / "bench" / f"{op}.py").is_file()


def test_each_install_command_names_extras_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = {
        extra for arguments in commands(".venv/bin/pip") for extra in re.findall(r"\.\[(\w+)\]", shlex.join(arguments))
    }
    assert shown == {"train", "dev"}
    assert shown <= set(extras)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/install.md"])
def test_files_it_links_to_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
