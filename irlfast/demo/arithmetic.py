"""Worked arithmetic: prompts, right and wrong workings, and the text a small language model is trained on.

A prompt is a start and some operations, ``17+5-3=``; a working does them one by one, ``17+5=22;22-3=19;``. Half of the
training text is by careful writers, who make no mistake. The other half is by sloppy writers, who get each result wrong
half of the time (by one or two) and go on from the wrong result; at least one of theirs is wrong. A model of that text
therefore writes right workings about half of the time, and can: what it lacks is a reason to.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from irlfast.data import TokenizedDemonstration

OPERATIONS = 2
LARGEST_START = 12
LARGEST_RESULT = 19
ERROR_RATE = 0.5

# A number is one token, as it is in the vocabularies of large models.
SYMBOLS = (*(str(number) for number in range(LARGEST_RESULT + 1)), "+", "-", "=", ";")
BOS, EOS, PAD = len(SYMBOLS), len(SYMBOLS) + 1, len(SYMBOLS) + 2
VOCAB_SIZE = len(SYMBOLS) + 3
MAX_RESPONSE = OPERATIONS * 6 + 1  # value, sign, step, =, result, ; for each operation, then EOS

_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
_TOKENS = re.compile(r"\d+|\D")


@dataclass(frozen=True)
class Problem:
    """A start and signed steps: (17, (5, -3)) is 17+5-3."""

    start: int
    steps: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return str(self.start) + "".join(f"{step:+d}" for step in self.steps) + "="

    @property
    def right_working(self) -> str:
        value, text = self.start, ""
        for step in self.steps:
            text += f"{value}{step:+d}={value + step};"
            value += step
        return text

    def wrong_working(self, rng: random.Random) -> str:
        """A sloppy writer's working, at least one result of it wrong."""
        while True:
            value, text, wrong = self.start, "", False
            for step in self.steps:
                result = value + step
                if rng.random() < ERROR_RATE:
                    result += rng.choice((-2, -1, 1, 2))
                    wrong = True
                if not 0 <= result <= LARGEST_RESULT:
                    break
                text += f"{value}{step:+d}={result};"
                value = result
            else:
                if wrong:
                    return text


def all_problems() -> list[Problem]:
    """Every problem whose results stay within [0, 19]."""
    problems = [Problem(start, ()) for start in range(1, LARGEST_START + 1)]
    for _ in range(OPERATIONS):
        problems = [
            Problem(p.start, (*p.steps, step))
            for p in problems
            for step in range(-9, 10)
            if step != 0 and 0 <= p.start + sum(p.steps) + step <= LARGEST_RESULT
        ]
    return problems


def encode(text: str) -> list[int]:
    """Token ids of prompt or working."""
    return [_IDS[symbol] for symbol in _TOKENS.findall(text)]


def decode(ids: list[int]) -> str:
    """The text of token ids; BOS, EOS and padding are left out."""
    return "".join(SYMBOLS[i] for i in ids if i < len(SYMBOLS))


def row(problem: Problem, working: str) -> TokenizedDemonstration:
    """A prompt and a working as token ids, with EOS."""
    return TokenizedDemonstration(
        prompt_ids=(BOS, *encode(problem.prompt)), response_ids=(*encode(working), EOS), truncated=False
    )


def is_right(problem: Problem, response_ids: list[int]) -> bool:
    """Whether a sampled response is the right working, whole, and ended by EOS."""
    return response_ids == [*encode(problem.right_working), EOS]


def mixed_text(problems: list[Problem], count: int, rng: random.Random) -> list[TokenizedDemonstration]:
    """`count` rows of training text, half by careful and half by sloppy writers."""
    rows = []
    for _ in range(count):
        problem = rng.choice(problems)
        careful = rng.random() < 0.5
        rows.append(row(problem, problem.right_working if careful else problem.wrong_working(rng)))
    return rows
