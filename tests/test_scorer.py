"""A saved reward as a function of text, and `irlfast score`, on stories260K."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.cli import main
from irlfast.data import DataError, Demonstration
from irlfast.rewards import BaseRewardModel, ReaderConfig, create_reward_model, read
from irlfast.rewards.reader import weights_digest
from irlfast.scorer import RewardScorer, TextForm, find_reward, trained_form

transformers = pytest.importorskip("transformers")

PAIR = Demonstration(prompt="Once upon a time", response=" there was a dog named Max.")
TEXT = Demonstration(
    prompt="", response="One day, a girl named Mia went for a walk. She saw a big dog and ran away.", is_text=True
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def language_model(stories: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(stories).eval()


Make = Callable[..., BaseRewardModel]


@pytest.fixture
def make(language_model: Any, stories: Path) -> Make:
    def reward(model_type: str = "mlp", *, statistics: bool = True, **options: Any) -> BaseRewardModel:
        torch.manual_seed(0)
        source = ReaderConfig(model=str(stories), token_statistics=statistics, weights=weights_digest(language_model))
        if model_type != "backbone":
            options["hidden_size"] = source.width(language_model.config.hidden_size)
        made = create_reward_model(options, model_type)
        made.source = None if model_type == "backbone" else source
        made.normalizer.update(torch.tensor([-1.0, 2.0]))
        return made.eval()

    return reward


@pytest.mark.parametrize("kind", ["mlp", "trajectory", "backbone"])
def test_a_score_is_the_reward_of_the_text_as_it_was_tokenised(
    make: Make, stories: Path, language_model: Any, tmp_path: Path, kind: str
) -> None:
    reward = make(kind, **({"model": str(stories)} if kind == "backbone" else {}))
    reward.save_pretrained(tmp_path)
    scorer = RewardScorer.from_pretrained(tmp_path)
    (score,) = scorer.score([PAIR], tokens=True)
    assert not isinstance(score, DataError)
    ids = scorer.tokenizer("Once upon a time there was a dog named Max.")["input_ids"]
    prompt = len(scorer.tokenizer("Once upon a time")["input_ids"])
    ids = torch.tensor([[*ids, scorer.tokenizer.eos_token_id]])
    real = torch.ones_like(ids, dtype=torch.bool)
    mask = torch.arange(ids.shape[1])[None] >= prompt
    with torch.no_grad():
        if kind == "backbone":
            want = reward(ids, real, mask)
        else:
            want = reward(read(language_model, ids, real, mask, reward.source).hidden_states, mask, real)  # type: ignore[arg-type]
    assert score.reward == pytest.approx(float(want), abs=1e-5)
    assert score.normalised == pytest.approx((score.reward - 0.5) / 1.5, abs=1e-5)
    assert "".join(score.tokens) == " there was a dog named Max.<s>"
    assert score.token_rewards is not None
    made_up = sum(score.token_rewards) / (len(score.tokens) if score.kind == "mean" else 1)
    assert made_up == pytest.approx(score.reward, abs=1e-5)


def test_a_batch_is_answered_in_its_order_whatever_it_holds(make: Make, language_model: Any, stories: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    scorer = RewardScorer(make(), tokenizer, language_model, form=TextForm(prompt_tokens=6), batch_size=2)
    empty = Demonstration(prompt="a", response="")
    rows = [TEXT, PAIR, empty, Demonstration(prompt="Hello", response=" you"), PAIR]
    answers = scorer.score(rows)
    assert isinstance(answers[2], DataError)
    assert "empty response" in str(answers[2])
    alone = [scorer.score([row])[0] for row in rows]
    for answer, single in zip(answers, alone, strict=True):
        if not isinstance(answer, DataError) and not isinstance(single, DataError):
            assert answer.reward == pytest.approx(single.reward, abs=1e-5)
    assert answers[1] == answers[4] or answers[1].reward == pytest.approx(answers[4].reward, abs=1e-5)  # type: ignore[union-attr]


def test_states_of_another_model_are_refused_and_never_made_up(make: Make, language_model: Any, stories: Path) -> None:
    """Regression: an earlier system went on with made-up states where it could not have the model's own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    other = transformers.AutoModelForCausalLM.from_config(language_model.config)
    with pytest.raises(ValueError, match=r"the language model given has weights .*: its states mean something else"):
        RewardScorer(make(), tokenizer, other)
    with pytest.raises(ValueError, match="give the language model it was trained on"):
        RewardScorer(make(), tokenizer)


def test_the_digest_tells_models_apart_and_not_their_precision(language_model: Any) -> None:
    import copy

    digest = weights_digest(language_model)
    assert len(digest) == 16
    assert weights_digest(copy.deepcopy(language_model).to(torch.bfloat16)) == digest
    tuned = copy.deepcopy(language_model)
    with torch.no_grad():
        tuned.model.norm.weight[3] += 0.1
    assert weights_digest(tuned) != digest
    assert weights_digest(torch.nn.Module()) == ""


def test_a_reward_is_found_in_a_run_a_checkpoint_and_its_own_folder(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4):
        make().save_pretrained(run / "checkpoints" / f"step-{step}" / "reward")
    (run / "checkpoints" / "latest").write_text("step-4\n")
    newest = run / "checkpoints" / "step-4" / "reward"
    assert find_reward(run) == find_reward(newest.parent) == find_reward(newest) == newest
    assert trained_form(newest) == TextForm()
    (run / "config.json").write_text('{"data": {"prompt_tokens": 8}, "train": {"rollout": {"max_new_tokens": 20}}}')
    assert trained_form(newest) == TextForm(prompt_tokens=8, max_response_tokens=20)
    with pytest.raises(FileNotFoundError, match=r"no reward in .*: give a folder that save_pretrained wrote"):
        find_reward(tmp_path)


def test_the_command_scores_a_file(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "reward")
    rows = [
        {"prompt": "Once upon a time", "response": " there was a dog named Max."},
        {"text": TEXT.response},
        {"prompt": "Once", "response": " é“x”"},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", "--reward", str(tmp_path / "reward"), "--input", str(file), "--prompt-tokens", "6"]
    assert main(arguments) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in shown] == [f"{file}:{i}" for i in (1, 2, 3)]
    assert (shown[0]["prompt"], shown[1]["text"]) == (rows[0]["prompt"], TEXT.response)
    assert all(len(row["tokens"]) == len(row["token_rewards"]) for row in shown)
    assert main([*arguments, "--output", str(tmp_path / "out.jsonl"), "--no-tokens", "--max-response-tokens", "3"]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(row) - {"source", "prompt", "response", "text"} for row in written] == [{"reward", "normalised"}] * 3
    assert written[0]["reward"] != shown[0]["reward"]  # cut after three tokens


def test_the_command_says_what_it_cannot_do(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = make()
    reward.save_pretrained(tmp_path / "reward")
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a", "response": ""}\n{"prompt": "a", "response": "b"}\n')
    arguments = ["score", "--input", str(file), "--reward"]
    assert main([*arguments, str(tmp_path / "reward")]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 rows could not be judged" in captured.err
    first, second = map(json.loads, captured.out.splitlines())
    assert "empty response" in first["error"]
    assert "reward" in second
    assert main([*arguments, str(tmp_path / "nowhere")]) == 1
    assert "no reward in" in capsys.readouterr().err
    reward.source = None
    reward.save_pretrained(tmp_path / "silent")
    assert main([*arguments, str(tmp_path / "silent")]) == 1
    assert "does not say whose hidden states it reads: give the language model with --model" in capsys.readouterr().err
