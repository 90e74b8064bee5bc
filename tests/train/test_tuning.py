"""Tuning on a given reward: what is sampled for pairs, and when the rewards are said to part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from irlfast.data import TokenizedDemonstration, load_preferences
from irlfast.eval.text_rewards import positive_sentences
from irlfast.rollout import SamplingParams
from irlfast.train.sampled_pairs import distinct_prompts, sample_pairs, write_rows
from irlfast.train.tuning import Overoptimization, TuningConfig


def test_rewards_part_where_the_learned_one_rises_and_the_true_one_falls() -> None:
    watch = Overoptimization(patience=2)
    assert [watch.update(*row) for row in ((0.0, 0.0, 0.1), (1.0, 1.0, 0.1), (2.0, 0.9, 0.1))] == [False] * 3
    assert watch.update(3.0, 0.7, 0.1)
    assert not watch.stopped
    assert not watch.update(4.0, 0.85, 0.1)  # within two standard errors again
    assert [watch.update(5.0, 0.5, 0.1), watch.stopped] == [True, False]
    assert [watch.update(6.0, 0.4, 0.1), watch.stopped] == [True, True]


def test_a_fall_of_both_rewards_is_no_overoptimisation_and_zero_patience_never_stops() -> None:
    watch = Overoptimization(patience=1)
    watch.update(1.0, 1.0, 0.01)
    assert not watch.update(0.5, 0.2, 0.01)
    never = Overoptimization(patience=0)
    never.update(1.0, 1.0, 0.01)
    assert never.update(2.0, 0.0, 0.01)
    assert not never.stopped


def test_a_configuration_takes_no_reward_steps() -> None:
    config = TuningConfig(iterations=3, beta=0.5).bilevel()
    assert (config.iterations, config.reward_steps, config.reward_warmup_steps, config.beta) == (3, 0, 0, 0.5)
    with pytest.raises(ValueError, match="stop_patience = -1"):
        TuningConfig(stop_patience=-1)


def test_pairs_of_two_models_are_split_by_prompt_and_scored(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from irlfast.commands.language_model import load_language_model

    model = load_language_model(str(shared_data / "models" / "stories260K"), device="cpu")
    starts = [model.tokenizer(text)["input_ids"] for text in ("Once", "One day", "Tom", "The cat", "Lily", "A dog")]
    rows = [
        TokenizedDemonstration(prompt_ids=tuple(s), response_ids=(5,), truncated=True) for s in [*starts, starts[0]]
    ]
    prompts = distinct_prompts(rows, model.tokenizer)
    assert [p.text for p in prompts] == ["Once", "One day", "Tom", "The cat", "Lily", "A dog"]
    assert len(distinct_prompts(rows, model.tokenizer, 2)) == 2

    def make() -> list[dict[str, object]]:
        return list(
            sample_pairs(
                prompts,
                {"tuned": model.engine(), "base": model.engine()},
                model.tokenizer,
                SamplingParams(max_new_tokens=24, n=3),
                fractions=(0.5, 0.25, 0.25),
                seed=0,
                score=positive_sentences,
                batch_size=4,
            )
        )

    found = make()
    assert found == make()
    assert len(found) == 6 * 2 * 3
    assert Counter(row["split"] for row in found) == {"train": 18, "validation": 6, "test": 12}
    for prompt in prompts:
        mine = [row for row in found if row["prompt_id"] == prompt.key]
        assert Counter(row["source"] for row in mine) == {"tuned": 3, "base": 3}
        assert len({row["split"] for row in mine}) == 1
        assert {row["prompt"] for row in mine} == {prompt.text}
    assert [row["score"] for row in found] == positive_sentences([""] * 36, [str(row["response"]) for row in found])
    # The two are drawn apart, though they are one model here.
    sides = {side: [row["response"] for row in found if row["source"] == side] for side in ("tuned", "base")}
    assert sides["tuned"] != sides["base"]

    path = tmp_path / "folder" / "pairs.jsonl"
    assert write_rows(path, iter(found)) == 36
    assert [json.loads(line) for line in path.read_text().splitlines()] == found
    splits = load_preferences(path)
    assert {p.prompt for p in splits.test} == {row["prompt"] for row in found if row["split"] == "test"}


def test_pairs_need_both_models() -> None:
    def nothing(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise AssertionError

    with pytest.raises(ValueError, match=r"engines are \['one'\]"):
        next(
            sample_pairs(
                [],
                {"one": None},
                None,
                SamplingParams(),
                fractions=(0.8, 0.1, 0.1),
                seed=0,
                score=nothing,  # type: ignore[dict-item]
            )
        )
