"""Every form of a preference file, what is refused and where, and that no text is on two sides of a split."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from irlfast.data import DataError, load_preferences
from irlfast.data.preference_rows import Scored, parse_dialogue_pair
from irlfast.data.preferences import pair_scored

THIRDS = (0.4, 0.3, 0.3)


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _all(splits: Any) -> list[Any]:
    return [*splits.train, *splits.validation, *splits.test]


def test_pairs_are_read_and_equal_answers_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    rows.append({"prompt": "q0", "chosen": "same", "rejected": "same"})
    found = _all(load_preferences(_write(tmp_path / "a.jsonl", rows), fractions=THIRDS))
    assert sorted((p.prompt, p.chosen, p.rejected) for p in found) == sorted(
        (f"q{i}", f"good {i}", f"bad {i}") for i in range(10)
    )


def test_rows_of_one_prompt_stay_together_and_a_seed_repeats(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 7} ", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(70)]
    path = _write(tmp_path / "a.jsonl", rows)
    splits = load_preferences(path, fractions=THIRDS, seed=3)
    prompts = [{p.prompt for p in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 7
    assert len(_all(splits)) == 70
    assert load_preferences(path, fractions=THIRDS, seed=3) == splits
    assert load_preferences(path, fractions=THIRDS, seed=4) != splits


def test_dialogues_share_a_prompt_and_differ_in_the_last_turn() -> None:
    opening = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant:"
    assert parse_dialogue_pair(f"{opening} fine", f"{opening} go away ") == (opening, "fine", "go away")


def test_dialogues_that_part_earlier_answer_with_all_that_follows() -> None:
    one = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: bye"
    two = "\n\nHuman: hi\n\nAssistant: what?"
    prompt, chosen, rejected = parse_dialogue_pair(one, two)
    assert prompt == "\n\nHuman: hi\n\nAssistant:"
    assert chosen == "hello\n\nHuman: bye\n\nAssistant: bye"
    assert rejected == "what?"


def test_text_that_looks_like_a_marker_inside_a_line_is_no_turn() -> None:
    opening = "\n\nHuman: say 'Human: x'\n\nAssistant:"
    assert parse_dialogue_pair(f"{opening} Human: x", f"{opening} no") == (opening, "Human: x", "no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("plain", "text", "expected a dialogue"),
        ("\n\nHuman: hi", "\n\nHuman: hi", "expected a dialogue"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b", "expected a dialogue"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: b", "share no human turn"),
    ],
)
def test_what_is_no_pair_of_dialogues_is_refused(chosen: str, rejected: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_dialogue_pair(chosen, rejected, "file:3")


def test_candidates_give_their_decided_pairs(tmp_path: Path) -> None:
    preferences = [
        {"first": 0, "second": 1, "preferred": 1},
        {"first": 0, "second": 2, "preferred": 2},
        {"first": 1, "second": 2, "preferred": 0},
    ]
    rows = [{"question": f"q{i}", "candidates": ["a", "b", "c"], "preferences": preferences} for i in range(5)]
    found = _all(load_preferences(_write(tmp_path / "a.jsonl", rows), fractions=THIRDS))
    assert {(p.chosen, p.rejected) for p in found} == {("a", "b"), ("c", "a")}
    assert len(found) == 10


def test_candidate_out_of_range_is_named(tmp_path: Path) -> None:
    row = {"question": "q", "candidates": ["a"], "preferences": [{"first": 0, "second": 4, "preferred": 1}]}
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'preferences', item 0 .* in 1 candidates"):
        load_preferences(_write(tmp_path / "a.jsonl", [row, row]))


def test_samples_of_two_models_pair_within_their_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{g}", "response": f"{side}{k}", "source": side, "prompt_id": g, "score": k + (side == "tuned")}
        for g in range(6)
        for side in ("tuned", "base")
        for k in range(2)
    ]
    found = _all(load_preferences(_write(tmp_path / "a.jsonl", rows), fractions=THIRDS))
    assert len(found) == 6 * 4
    assert all(p.chosen.startswith("tuned") and p.rejected.startswith("base") for p in found)
    assert {(p.chosen, p.chosen_score) for p in found} == {("tuned0", 1.0), ("tuned1", 2.0)}


def test_scored_texts_prefer_the_right_side_and_never_cross_a_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"t{i % 90}", "toxicity": (i % 90) % 3 / 2}) + "\n" for i in range(100))
    splits = load_preferences(path, score_field="toxicity", lower_is_better=True, pairs_per_text=3, fractions=THIRDS)
    # Three partners a text to learn from, one to be judged by.
    assert 2 * len(splits.test) < len(splits.train)
    texts = []
    for part in (splits.train, splits.validation, splits.test):
        assert len({(p.chosen, p.rejected) for p in part}) == len(part)
        for pair in part:
            assert pair.chosen_score is not None
            assert pair.rejected_score is not None
            assert pair.chosen_score > pair.rejected_score
            assert int(pair.chosen[1:]) % 3 < int(pair.rejected[1:]) % 3
        texts.append({text for p in part for text in (p.chosen, p.rejected)})
    assert sum(map(len, texts)) == len(set().union(*texts))


def test_a_gap_and_a_prompt_bound_what_is_paired() -> None:
    rows = [
        Scored(prompt=prompt, response=f"{prompt}{score}", score=float(score), key=prompt, source="")
        for prompt in "ab"
        for score in range(5)
    ]
    pairs = pair_scored(rows, pairs_per_text=10, min_gap=3.0)
    assert {(p.chosen, p.rejected) for p in pairs} == {
        (f"{prompt}{high}", f"{prompt}{low}") for prompt in "ab" for high, low in ((3, 0), (4, 0), (4, 1))
    }
    assert pair_scored(rows[:1]) == []


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[]], {}, r"a\.jsonl:1: expected an object, got list"),
        ([{"text": "x"}], {}, r"a\.jsonl:1: no form .*\['text'\]"),
        ([{"text": "x"}], {"score_field": "toxic"}, r"a\.jsonl:1: field 'toxic', the score, is missing"),
        ([{"text": "x", "toxic": "much"}], {"score_field": "toxic"}, r"field 'toxic' must be a number, got 'much'"),
        ([{"text": "x", "toxic": float("nan")}], {"score_field": "toxic"}, r"must be a number, got nan"),
        ([{"prompt": "p", "chosen": 1, "rejected": "x"}], {}, r"field 'chosen' must be a string, got int 1"),
        ([{"candidates": ["a"], "preferences": []}], {}, r"field 'prompt' is missing"),
        ([{"prompt": "p", "response": "r", "source": "me", "prompt_id": 1}], {}, r"'source' is 'me'"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], {}, r"no pair in the (train|validation|test) split"),
        ([], {}, r"has no rows"),
    ],
)
def test_bad_rows_are_refused_by_place(tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(_write(tmp_path / "a.jsonl", rows), **options)


def test_one_group_with_two_prompts_is_refused(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "response": "r", "source": "tuned", "prompt_id": 1},
        {"prompt": "q", "response": "s", "source": "base", "prompt_id": 1},
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:2: prompt_id 1 has another prompt than in .*:1"):
        load_preferences(_write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    "options", [{"fractions": (0.5, 0.5, 0.5)}, {"pairs_per_text": 0}, {"min_gap": -1.0}, {"limit": 1}]
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load_preferences(tmp_path / "absent.jsonl", **options)


def test_the_real_files_are_read(shared_data: Path) -> None:
    dialogues = load_preferences(shared_data / "hh-rlhf" / "harmless-base" / "test.jsonl.gz")
    assert len(_all(dialogues)) == 1767
    assert all(p.prompt.endswith("\n\nAssistant:") and p.chosen != p.rejected for p in _all(dialogues))
    answers = load_preferences(shared_data / "qa-feedback" / "dev_feedback.jsonl.gz")
    assert len(_all(answers)) == 2616
    tweets = load_preferences(
        shared_data / "toxicity" / "tweets_offensive.jsonl.gz", score_field="toxicity", lower_is_better=True, limit=3000
    )
    assert all((p.chosen_score or 0.0) > (p.rejected_score or 0.0) for p in _all(tweets))
