"""What docs/rewards.md shows works as it stands there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.data import DataError, Demonstration
from irlfast.rewards import ReaderConfig, TrajectoryRewardModel, create_reward_model
from irlfast.scorer import RewardScorer
from irlfast.train.monitors import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_example_trains_a_reward_and_brings_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "rewards.md", "exec"), names)
    assert isinstance(names["again"], TrajectoryRewardModel)
    assert names["again"].source == names["source"]
    assert torch.equal(names["again"].serve(*names["inputs"]), names["served"])
    served, good = names["served"], names["good"]
    assert float(served[good].min()) > float(served[~good].max())
    assert names["tokens"].kind == "mean"


def test_the_function_for_trl_gives_a_reward_or_none(
    make_lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = create_reward_model({"hidden_size": 32, "pooling": "mean"}).eval()
    reward.source = ReaderConfig(token_statistics=False)
    reward.normalizer.update(torch.tensor([-1.0, 3.0]))
    scorer = RewardScorer(reward, tokenizer, make_lm("llama"))
    monkeypatch.setattr(RewardScorer, "from_pretrained", lambda folder: scorer)
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[2], "rewards.md", "exec"), names)
    got = names["learned_reward"](prompts=["w1 w2", "w3", "w4"], completions=[" w5", "", " w6 w7"], trainer_state=None)
    assert got[1] is None
    want = scorer.score([Demonstration(prompt="w4", response=" w6 w7")], tokens=True)[0]
    assert not isinstance(want, DataError)
    assert got[2] == pytest.approx(want.normalised, abs=1e-6)
    assert want.tokens[-1].strip() == "</s>"


def test_its_commands_and_rules_are_the_real_ones() -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "irlfast"
        assert callable(tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments))
    fits = "--reward-model.hidden-sizes --reward-model.pooling last --reward-model.output-bound None"
    fits += " --reward.no-token-statistics"
    assert fits in " ".join(PAGE.split())
    arguments = ["bilevel", "--model", "m", "--demonstrations", "d", *fits.split()]
    assert callable(tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments))
    assert re.findall(r"^\| `(\w+)` \| [a-zA-Z]", PAGE.split("## Signs")[1], flags=re.MULTILINE) == list(RULES)
