"""Read preferences: of two answers to one prompt, which is the better one. preference_rows.py has the forms of a row.

Rows of one prompt never come apart: train, validation and test are split by prompt, and by text where there is none,
BEFORE scored texts are paired, so no text of the test is ever trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from .demonstrations import DataError, json_lines
from .preference_rows import SPLITS, Preference, Scored, read_pairs, read_scored

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[R]):
    """Rows to learn from, to choose by, and to report on."""

    train: list[R]
    validation: list[R]
    test: list[R]


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
        pairs_per_text: partners drawn for each scored text of the train split, within it (and its prompt). Elsewhere it
            is one, so that the pairs of an interval share few texts.
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
        texts = split_by_key([read_scored(row, where, score_field, sign) for where, row in located], fractions, seed)

        def pair(rows: list[Scored], partners: int = 1) -> list[Preference]:
            return pair_scored(rows, pairs_per_text=partners, min_gap=min_gap, seed=seed)

        train = pair(texts.train, pairs_per_text)
        splits = Splits(train=train, validation=pair(texts.validation), test=pair(texts.test))
    else:
        rows = list(read_pairs(located))
        told = {row.split for row in rows}
        if "" in told and len(told) > 1:
            raise DataError(f"{path}: some rows have a split and some have none; give all of them one, or none")
        splits = split_by_key(rows, fractions, seed) if told <= {""} else _as_told(rows)
    for name in SPLITS:
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


def _as_told(rows: Sequence[Preference]) -> Splits[Preference]:
    train, validation, test = ([row for row in rows if row.split == name] for name in SPLITS)
    return Splits(train=train, validation=validation, test=test)


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
