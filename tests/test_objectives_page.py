"""docs/objectives.md: its code runs as written and trains, its table lists what options exist, its command parses."""

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.losses import make_objective, objective_names, registry

PAGE = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
SHARED = {"weight_clip", "weight_temper", "centre", "label_smoothing"}


def table() -> dict[str, tuple[set[str], set[str]]]:
    """Own and shared options by objective, as the page lists them; what stands behind a colon are values."""
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if len(cells) == 5 and (name := re.fullmatch(r"`(\w+)`", cells[0])):
            rows[name[1]] = set(re.findall(r"`(\w+)`", cells[3])), set(re.findall(r"`(\w+)`", cells[4]))
    return rows


def test_every_objective_and_option_is_in_the_table() -> None:
    rows = table()
    assert list(rows) == list(objective_names())
    for name, (own, shared) in rows.items():
        objective = make_objective(name)
        options = {field.name for field in fields(objective)}
        assert own == options - SHARED, name
        assert shared == options & SHARED | ({"replay"} if objective.takes_replay else set()), name


def test_the_objective_of_the_page_runs_as_written_and_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from irlfast.demo.toy import make_toy_trainer, toy_config
    from irlfast.rollout import SamplingParams
    from irlfast.train import RewardConfig

    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in example.split("@register_objective")[1].splitlines() if line]) <= 10
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(example, "docs/objectives.md", "exec"), names)

    config = replace(
        toy_config(),
        iterations=4,
        prompts_per_step=32,
        checkpoint_every=2,
        eval_every=4,
        eval_prompts=8,
        rollout=SamplingParams(max_new_tokens=5, n=32),
        reward=RewardConfig(objective="least_squares", options={"target": 2.0}),
    )
    trainer = make_toy_trainer(0, config, tmp_path)
    experience = trainer._gather()
    expert, sample = (trainer.rewards(s) for s in (experience.experts, experience.samples))
    want = (expert - 2).square().mean() + sample.square().mean()
    assert trainer.reward_step(experience)["loss"] == pytest.approx(float(want), rel=1e-5)
    trainer.train()
    again = make_toy_trainer(0, config, tmp_path)
    assert again.resume() == 4
    assert torch.equal(again.reward.network[0].weight, trainer.reward.network[0].weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'least_squares' has no option 'aim'; its options: target"):
        RewardConfig(objective="least_squares", options={"aim": 2.0})


def test_the_command_of_the_page_parses(capsys: pytest.CaptureFixture[str]) -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands.bilevel import BiLevelCommand

    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    program, subcommand, *arguments = shlex.split(block)
    assert (program, subcommand) == ("irlfast", "bilevel")
    reward = tyro.cli(BiLevelCommand, args=arguments).train.reward
    assert reward.objective == "gail"
    assert reward.make_objective().policy_reward_kind == "logit"
    with pytest.raises(SystemExit):
        tyro.cli(BiLevelCommand, args=["--help"])
    shown = capsys.readouterr().out
    assert ", ".join(objective_names()) in " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    for option in ("objective", "options", "weight-clip", "label-smoothing", "gradient-penalty", "r1", "replay"):
        assert f"--reward.{option}" in shown
