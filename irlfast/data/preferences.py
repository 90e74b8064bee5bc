"""Read preferences: of two answers to one prompt, which is the better one.

A row has one of these forms; other fields are ignored:

    {"prompt", "chosen", "rejected"}                              a pair
    {"chosen", "rejected"}                                        two dialogues of "Human:" and "Assistant:" turns;
                                                                  the prompt is all that they share (hh-rlhf)
    {"question" or "prompt", "candidates", "preferences"}         answers, and {"first", "second", "preferred"} with
                                                                  preferred 1, 2 or 0 for neither (qa-feedback)
    {"prompt", "response", "source", "prompt_id"}                 samples of a tuned model and of its base: every tuned
                                                                  answer over every base answer to the same prompt
    {"text", SCORE} or {"prompt", "response", SCORE}              scored texts; the higher score is preferred

Rows of one prompt never come apart: train, validation and test are split by prompt, and by text where there is none,
BEFORE scored texts are paired, so no text of the test is ever trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from .demonstrations import DataError, json_lines, required_string

TUNED, BASE = "tuned", "base"
_TURN = re.compile(r"\n\n(Human|Assistant):")

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to one prompt, the first of which is better.

    Args:
        prompt: what both answer; "" for plain texts.
        chosen, rejected: the better and the worse answer.
        chosen_score, rejected_score: what a ground truth says of them, where there is one.
        key: equal for rows that must not be split.
        source: where the row was read, "file:line" (from 1).
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    key: Hashable = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[R]):
    """Rows to learn from, to choose by, and to report on."""

    train: list[R]
    validation: list[R]
    test: list[R]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A text and the number somebody gave it. prompt is "" for plain texts; key as in Preference."""

    prompt: str
    response: str
    score: float
    key: Hashable
    source: str


def load_preferences(
    path: str | Path,
    *,
    score_field: str | None = None,
    lower_is_better: bool = False,
    pairs_per_text: int = 1,
    min_gap: float = 0.0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    limit: int | None = None,
    seed: int = 0,
) -> Splits[Preference]:
    """Read a file of preferences, whatever its form, split by prompt.

    Args:
        path: JSON lines, also gzipped.
        score_field: name of the score, for scored texts only.
        lower_is_better: prefer the lower score (toxicity); ground-truth scores then come back negated, so that higher
            is better everywhere.
        pairs_per_text: partners drawn for each scored text within its split (and its prompt).
        min_gap: least difference of two scores that makes a pair, at least 0; equal scores never do.
        fractions: shares of train, validation and test, positive, that add up to 1.
        limit: read the first so many rows; None is all.
        seed: of the split and the pairing; the same file and seed give the same pairs.

    Raises:
        DataError: a row that cannot be used, naming file, line and field, or a split without a pair.
        ValueError: an option out of its range.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions are {fractions}; expected three positive shares that add up to 1")
    if pairs_per_text < 1:
        raise ValueError(f"pairs_per_text is {pairs_per_text}; expected at least 1")
    if not min_gap >= 0:
        raise ValueError(f"min_gap is {min_gap}; expected a difference of at least 0")
    if limit is not None and limit < 2:
        raise ValueError(f"limit is {limit}; expected at least 2 rows, or None for all")
    located = list(islice(json_lines(Path(path)), limit))
    if not located:
        raise DataError(f"{path} has no rows")
    if score_field is not None:
        sign = -1.0 if lower_is_better else 1.0
        texts = split_by_key([_scored(row, where, score_field, sign) for where, row in located], fractions, seed)

        def pair(rows: list[Scored]) -> list[Preference]:
            return pair_scored(rows, pairs_per_text=pairs_per_text, min_gap=min_gap, seed=seed)

        splits = Splits(train=pair(texts.train), validation=pair(texts.validation), test=pair(texts.test))
    else:
        splits = split_by_key(list(_pairs(located)), fractions, seed)
    for name in ("train", "validation", "test"):
        if not getattr(splits, name):
            raise DataError(f"{path}: no pair in the {name} split; give more rows, or other fractions ({fractions})")
    return splits


def split_by_key(rows: Sequence[R], fractions: tuple[float, float, float], seed: int) -> Splits[R]:
    """Shuffle the keys and deal them out; rows of one key stay together and in their order."""
    keys = list(dict.fromkeys(row.key for row in rows))  # type: ignore[attr-defined]
    random.Random(seed).shuffle(keys)
    first = round(fractions[0] * len(keys))
    second = round((fractions[0] + fractions[1]) * len(keys))
    place = {key: (i >= first) + (i >= second) for i, key in enumerate(keys)}
    parts: tuple[list[R], list[R], list[R]] = ([], [], [])
    for row in rows:
        parts[place[row.key]].append(row)  # type: ignore[attr-defined]
    return Splits(train=parts[0], validation=parts[1], test=parts[2])


def pair_scored(
    rows: Sequence[Scored], *, pairs_per_text: int = 1, min_gap: float = 0.0, seed: int = 0
) -> list[Preference]:
    """Pair each text with up to `pairs_per_text` random others of its prompt whose score differs by more than 0 and at
    least `min_gap`. No pair comes twice."""
    random_ = random.Random(seed)
    by_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(i)
    found: dict[tuple[str, str, str], Preference] = {}
    for i, row in enumerate(rows):
        others = by_prompt[row.prompt]
        made = 0
        # Drawing at random is quick where most scores differ; the bound ends it where hardly any does.
        for _ in range(20 * pairs_per_text):
            j = others[random_.randrange(len(others))]
            gap = abs(row.score - rows[j].score)
            low, high = sorted((i, j), key=lambda k: rows[k].score)
            texts = row.prompt, rows[high].response, rows[low].response
            if gap == 0 or gap < min_gap or texts in found:
                continue
            found[texts] = Preference(
                prompt=row.prompt,
                chosen=rows[high].response,
                rejected=rows[low].response,
                chosen_score=rows[high].score,
                rejected_score=rows[low].score,
                key=(rows[high].key, rows[low].key),
                source=row.source,
            )
            made += 1
            if made == pairs_per_text:
                break
    return list(found.values())


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


def _pairs(located: Iterable[tuple[str, Any]]) -> Iterator[Preference]:
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
    for where, row in located:
        side = row["source"]
        if side not in (TUNED, BASE):
            raise DataError(f"{where}: field 'source' is {side!r}, expected {TUNED!r} or {BASE!r}")
        prompt, response = required_string(row, "prompt", where), required_string(row, "response", where)
        score = _number(row, "score", where) if row.get("score") is not None else None
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
                        source=where,
                    )


def _scored(row: Any, where: str, field: str, sign: float) -> Scored:
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
