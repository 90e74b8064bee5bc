"""Functions of the text as reward models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from irlfast.rewards import TextRewardConfig, TextRewardModel, load_reward_model, load_text_reward


class Letters:
    """A tokenizer whose token i is the i-th letter; 0 is padding and 1 EOS."""

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(95 + i) for i in row if i > 1) for row in rows]


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(response) + 10.0 * len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


IDS = torch.tensor([[2, 3, 4, 1, 0], [2, 2, 2, 4, 5]])
ATTENTION = IDS != 0
RESPONSE = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)


def test_prompt_and_response_reach_the_function_as_text() -> None:
    seen: list[tuple[Sequence[str], Sequence[str]]] = []

    def function(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.append((prompts, responses))
        return lengths(prompts, responses)

    model = TextRewardModel(TextRewardConfig(name="lengths"), function=function, tokenizer=Letters())
    rewards = model(IDS, ATTENTION, RESPONSE)
    assert seen == [(["a", "aaa"], ["bc", "cd"])]
    assert rewards.tolist() == [12.0, 32.0]
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad
    # Serving keeps the order.
    served = model.serve(IDS, ATTENTION, RESPONSE, update=True)
    assert served[0] < served[1]


def test_a_saved_one_keeps_its_name_and_normaliser_and_runs_nothing(tmp_path: Path) -> None:
    model = TextRewardModel(TextRewardConfig(name="os.abort"), function=lengths, tokenizer=Letters())
    model.serve(IDS, ATTENTION, RESPONSE, update=True)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match=r"'os\.abort' is not stored in a file"):
        loaded(IDS, ATTENTION, RESPONSE)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "gave 1 rewards for 2 responses"), ([1.0, float("nan")], "gave nan for the response 'cd'")],
)
def test_answers_that_do_not_fit_are_refused(values: list[float], message: str) -> None:
    model = TextRewardModel(TextRewardConfig(name="f"), function=lambda p, r: values, tokenizer=Letters())
    with pytest.raises(ValueError, match=message):
        model(IDS, ATTENTION, RESPONSE)


def test_a_name_is_a_function() -> None:
    function = load_text_reward("irlfast.eval.text_rewards.positive_sentences")
    assert function(["x"], ["A happy cat. It sat."]) == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no folder and no package.module.function"),
        ("irlfast.nothing.f", "cannot be imported: No module named 'irlfast.nothing'"),
        ("irlfast.eval.text_rewards.nothing", "cannot be imported: .* has no attribute 'nothing'"),
        ("irlfast.eval.text_rewards.POSITIVE_WORDS", "is a frozenset, not a function"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text_reward(name)


def test_a_classifier_of_transformers_is_a_reward(tmp_path: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    tokenizer.pad_token = tokenizer.unk_token
    models = {}
    for labels in (1, 2):
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=labels,
        )
        models[labels] = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        models[labels].save_pretrained(tmp_path / str(labels))
        tokenizer.save_pretrained(tmp_path / str(labels))
    reward = load_text_reward(str(tmp_path / "1"))
    texts = ["a dog ran.", "the little cat sat on a big mat."]
    found = reward(["One day ", "Then "], texts)
    for prompt, text, value in zip(["One day ", "Then "], texts, found, strict=True):
        alone = models[1](**tokenizer(prompt + text, return_tensors="pt")).logits[0, 0]
        assert value == pytest.approx(float(alone.detach()), abs=1e-5)
    with pytest.raises(ValueError, match="has 2 labels; a reward needs a classifier with one"):
        load_text_reward(str(tmp_path / "2"))
