"""The forms that rows of preferences have.

Other fields are ignored:

    {"prompt", "chosen", "rejected"}                              a pair
    {"chosen", "rejected"}                                        two dialogues of "Human:" and "Assistant:" turns;
                                                                  the prompt is all that they share (hh-rlhf)
    {"question" or "prompt", "candidates", "preferences"}         answers, and {"first", "second", "preferred"} with
                                                                  preferred 1, 2 or 0 for neither (qa-feedback)
    {"prompt", "response", "source", "prompt_id"}                 samples of a tuned model and of its base: every tuned
                                                                  answer over every base answer to the same prompt;
                                                                  a "split" says where the prompt belongs
    {"text", SCORE} or {"prompt", "response", SCORE}              scored texts; the higher score is preferred
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .demonstrations import DataError, required_string

SPLITS = ("train", "validation", "test")
TUNED, BASE = "tuned", "base"
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to one prompt, the first of which is better.

    Args:
        prompt: what both answer; "" for plain texts.
        chosen, rejected: the better and the worse answer.
        chosen_score, rejected_score: what a ground truth says of them, where there is one.
        key: equal for rows that must not be split.
        split: "train", "validation" or "test" where the file says so, else "".
        source: where the row was read, "file:line" (from 1).
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    key: Hashable = None
    split: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A text and the number somebody gave it. prompt is "" for plain texts; key as in Preference."""

    prompt: str
    response: str
    score: float
    key: Hashable
    source: str


def parse_dialogue_pair(chosen: str, rejected: str, where: str = "") -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of two dialogues: the prompt is the turns that both share, and ends with
    the "\\n\\nAssistant:" that both go on from.

    Raises:
        DataError: a text that is no such dialogue, or two that share no turn of a human.
    """
    turns = [_turns(text, where) for text in (chosen, rejected)]
    shared = 0
    for left, right in zip(*turns, strict=False):
        if left != right:
            break
        shared += 1
    # Equal dialogues differ nowhere; both answer with their last turn then.
    shared = min(shared, len(turns[0]) - 1, len(turns[1]) - 1)
    while shared > 0 and not (turns[0][shared][0] == turns[1][shared][0] == "Assistant"):
        shared -= 1
    if shared == 0:
        raise DataError(f"{where}: chosen and rejected share no human turn that both answer")
    prompt = "".join(f"\n\n{role}:{text}" for role, text in turns[0][:shared]) + "\n\nAssistant:"
    answers = []
    for side in turns:
        (_, answer), *later = side[shared:]
        answers.append((answer + "".join(f"\n\n{role}:{text}" for role, text in later)).strip())
    return prompt, answers[0], answers[1]


def _turns(text: str, where: str) -> list[tuple[str, str]]:
    parts = _TURN.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[-2] != "Assistant":
        raise DataError(
            f'{where}: expected a dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns that ends with the '
            f'assistant\'s, or a "prompt" beside chosen and rejected; got {text[:60]!r}'
        )
    return list(zip(parts[1::2], parts[2::2], strict=True))


def read_pairs(located: Iterable[tuple[str, Any]]) -> Iterator[Preference]:
    """Pairs of ("file:line", row)s. DataError: a row of no known form, or a field that does not fit it."""
    samples: list[tuple[str, Mapping[str, Any]]] = []
    for where, row in located:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        fields = row.keys()
        if {"prompt", "response", "source", "prompt_id"} <= fields:
            samples.append((where, row))
            continue
        form = next((read for needed, read in _FORMS if needed <= fields), None)
        if form is None:
            raise DataError(
                f"{where}: no form of preference has the fields {sorted(fields)}; expected chosen and rejected, "
                "candidates and preferences, or response, source and prompt_id; scored texts need score_field"
            )
        yield from form(row, where)
    yield from _sampled_pairs(samples)


def _pair(row: Mapping[str, Any], where: str) -> Iterator[Preference]:
    chosen, rejected = required_string(row, "chosen", where), required_string(row, "rejected", where)
    if row.get("prompt") is not None:
        prompt = required_string(row, "prompt", where)
    else:
        prompt, chosen, rejected = parse_dialogue_pair(chosen, rejected, where)
    if chosen != rejected:  # equal answers say nothing
        yield Preference(prompt=prompt, chosen=chosen, rejected=rejected, key=_key(prompt), source=where)


def _candidates(row: Mapping[str, Any], where: str) -> Iterator[Preference]:
    prompt = required_string(row, "question" if "question" in row else "prompt", where)
    candidates, preferences = row["candidates"], row["preferences"]
    if not isinstance(candidates, list) or not all(isinstance(text, str) for text in candidates):
        raise DataError(f"{where}: field 'candidates' must be a list of strings")
    if not isinstance(preferences, list):
        raise DataError(f"{where}: field 'preferences' must be a list")
    for i, item in enumerate(preferences):
        try:
            first, second, preferred = item["first"], item["second"], item["preferred"]
            answers = candidates[first], candidates[second]
        except (KeyError, TypeError, IndexError) as cause:
            raise DataError(
                f"{where}: field 'preferences', item {i} must be {{first, second, preferred}} with places in "
                f"{len(candidates)} candidates, got {item!r}"
            ) from cause
        if preferred not in (0, 1, 2):
            raise DataError(f"{where}: field 'preferences', item {i}: preferred is {preferred!r}, expected 0, 1 or 2")
        if preferred and answers[0] != answers[1]:
            chosen, rejected = answers if preferred == 1 else answers[::-1]
            yield Preference(prompt=prompt, chosen=chosen, rejected=rejected, key=_key(prompt), source=where)


_FORMS: tuple[tuple[set[str], Callable[[Mapping[str, Any], str], Iterator[Preference]]], ...] = (
    ({"chosen", "rejected"}, _pair),
    ({"candidates", "preferences"}, _candidates),
)


def _sampled_pairs(located: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Preference]:
    """Every answer of the tuned model over every one of the base, prompt by prompt."""
    groups: dict[Any, dict[str, list[tuple[str, float | None, str, str]]]] = {}
    splits: dict[Any, str] = {}
    for where, row in located:
        side = row["source"]
        if side not in (TUNED, BASE):
            raise DataError(f"{where}: field 'source' is {side!r}, expected {TUNED!r} or {BASE!r}")
        prompt, response = required_string(row, "prompt", where), required_string(row, "response", where)
        score = _number(row, "score", where) if row.get("score") is not None else None
        split = row.get("split", "")
        if split and split not in SPLITS:
            raise DataError(f"{where}: field 'split' is {split!r}, expected one of {SPLITS}")
        if splits.setdefault(row["prompt_id"], split) != split:
            raise DataError(f"{where}: prompt_id {row['prompt_id']!r} is in {splits[row['prompt_id']]!r} and {split!r}")
        groups.setdefault(row["prompt_id"], {TUNED: [], BASE: []})[side].append((response, score, prompt, where))
    for group, sides in groups.items():
        for chosen, chosen_score, prompt, where in sides[TUNED]:
            for rejected, rejected_score, other, other_where in sides[BASE]:
                if prompt != other:
                    raise DataError(f"{other_where}: prompt_id {group!r} has another prompt than in {where}")
                if chosen != rejected:
                    yield Preference(
                        prompt=prompt,
                        chosen=chosen,
                        rejected=rejected,
                        chosen_score=chosen_score,
                        rejected_score=rejected_score,
                        key=_key(prompt),
                        split=splits[group],
                        source=where,
                    )


def read_scored(row: Any, where: str, field: str, sign: float) -> Scored:
    """A scored text, its score times `sign`. DataError: a field that is missing or does not fit."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    if field not in row:
        raise DataError(f"{where}: field {field!r}, the score, is missing; fields found: {sorted(row)}")
    plain = "text" in row
    response = required_string(row, "text" if plain else "response", where)
    prompt = "" if plain else required_string(row, "prompt", where)
    key = _key(response) if plain else _key(prompt)
    return Scored(
        prompt=prompt, response=response, score=sign * _number(row, field, where) + 0.0, key=key, source=where
    )


def _number(row: Mapping[str, Any], field: str, where: str) -> float:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise DataError(f"{where}: field {field!r} must be a number, got {value!r}")
    return float(value)


def _key(text: str) -> str:
    """Equal for texts that differ in white space alone."""
    return " ".join(text.split())
