"""The reward function as OpenRLHF 0.11.0 loads it, calls it and reads its answer (openrlhf/utils/agent.py there)."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from irlfast.data import TokenizedDemonstration
from irlfast.integrations import openrlhf
from irlfast.rewards import ReaderConfig, create_reward_model
from irlfast.rewards.reader import weights_digest
from irlfast.scorer import RewardScorer

EOS = 2


@pytest.fixture(scope="module")
def saved(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward on the policy's states, with statistics of its own."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(policy_folder)
    torch.manual_seed(0)
    reward = create_reward_model({"hidden_size": 34, "pooling": "mean"})
    reward.source = ReaderConfig(model=str(policy_folder), weights=weights_digest(model))
    reward.normalizer.update(torch.tensor([-0.1, 0.3]))
    folder = tmp_path_factory.mktemp("reward")
    reward.save_pretrained(folder)
    return folder


def load(path: str) -> Callable[..., dict[str, Any]]:
    """The function of a file, as --reward.remote_url takes it: outside any package."""
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., dict[str, Any]] = module.reward_func
    return function


def test_it_judges_what_was_sampled(saved: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples in threads at once, one that ended, one that was cut, one of a chat whose template writes BOS."""
    monkeypatch.setenv("IRLFAST_REWARD", str(saved))
    function = load(openrlhf.__file__)
    samples = [("w0 w1", [4, 5, EOS]), ("w0 w1", [4, 5]), ("<s> w3", [6, EOS])]

    async def judge(prompt: str, action: list[int]) -> dict[str, Any]:
        ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        query = tokenizer.decode(ids + action, skip_special_tokens=False)
        return await asyncio.to_thread(function, [query], [prompt], ["a label"])

    async def judge_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(judge(*sample) for sample in samples))

    answers = asyncio.run(judge_all())
    rows = [
        TokenizedDemonstration(
            prompt_ids=tuple(tokenizer(text=prompt, add_special_tokens=False)["input_ids"]),
            response_ids=tuple(action),
            truncated=False,
        )
        for prompt, action in samples
    ]
    want = RewardScorer.from_pretrained(saved).score_tokenized(rows)
    for answer, score in zip(answers, want, strict=True):
        # What OpenRLHF makes of it.
        assert torch.tensor([answer["rewards"]]).item() == pytest.approx(score.normalised, abs=1e-5)
        in_unit_interval = torch.tensor([answer["scores"]]).item()
        assert in_unit_interval == pytest.approx(1 / (1 + torch.tensor(-score.normalised).exp().item()), abs=1e-5)
        assert answer["extra_logs"]["raw_reward"].flatten()[0].item() == pytest.approx(score.reward, abs=1e-5)
    assert abs(want[0].reward - want[1].reward) > 1e-4  # EOS is judged too


def test_a_tokenizer_that_puts_bos_in_front_gets_it_once(saved: Path, tokenizer: Any) -> None:
    """In training prompts began with it; OpenRLHF samples without, unless the prompt spells it out."""
    tokenizers = pytest.importorskip("tokenizers")
    function = openrlhf.RewardFunction(saved)
    function.scorer.tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    seen: list[TokenizedDemonstration] = []
    score_tokenized = function.scorer.score_tokenized
    function.scorer.score_tokenized = lambda rows: seen.extend(rows) or score_tokenized(rows)  # type: ignore[method-assign,assignment]
    answer = function(["w0 w1 </s>", "<s> w0 w1 </s>"], ["w0", "<s> w0"], ["", ""])
    assert [row.prompt_ids for row in seen] == [(1, 3), (1, 3)]
    assert [row.response_ids for row in seen] == [(4, EOS), (4, EOS)]
    assert answer["rewards"].shape == (2,)
    assert float(answer["rewards"][0]) == pytest.approx(float(answer["rewards"][1]), abs=1e-6)


def test_what_it_cannot_judge_is_in_the_log(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    function = openrlhf.RewardFunction(saved)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="does not begin with its prompt"):
        function(["w5 w1"], ["w0 w5"], [""])
    assert "no reward for 1 samples" in caplog.text
    with pytest.raises(ValueError, match="no response"):
        function(["w0"], ["w0"], [""])
    caplog.clear()
    with torch.no_grad():
        next(function.scorer.reward.parameters()).fill_(torch.nan)
    with caplog.at_level(logging.ERROR), pytest.raises(ArithmeticError, match="diverged"):
        function(["w0 w1"], ["w0"], [""])
    assert "no reward for 1 samples" in caplog.text


def test_without_a_reward_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRLFAST_REWARD", raising=False)
    with pytest.raises(KeyError, match="IRLFAST_REWARD is not set"):
        load(openrlhf.__file__)(["w0 w1"], ["w0"], [""])
