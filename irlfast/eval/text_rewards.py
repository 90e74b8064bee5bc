"""Known rewards of English stories, clear functions of the text, to tune a model on and to judge a learned reward by.

Each takes (prompts, responses) and looks at the responses alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

POSITIVE_WORDS = frozenset(
    [
        "happy",
        "happily",
        "glad",
        "smile",
        "smiled",
        "smiling",
        "laugh",
        "laughed",
        "laughing",
        "love",
        "loved",
        "loves",
        "fun",
        "joy",
        "kind",
        "friend",
        "friends",
        "nice",
        "good",
        "great",
        "best",
        "beautiful",
        "hug",
        "hugged",
        "play",
        "played",
        "playing",
        "excited",
        "proud",
        "safe",
        "thank",
        "thanked",
        "yay",
        "wonderful",
    ]
)
_SENTENCE = re.compile(r"[^.!?]+")
_WORD = re.compile(r"[a-z']+")


def positive_sentences(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of a response's sentences that hold at least one of POSITIVE_WORDS; 0 without a sentence. In [0, 1]."""
    return [_positive_share(text) for text in responses]


def word_length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Mean number of letters of a response's words, less 4 (about the mean of simple stories); -4 without a word.

    A mean over words, so a longer response is worth no more than a shorter one like it.
    """
    found = ([len(word) for word in _WORD.findall(text.lower())] for text in responses)
    return [sum(lengths) / max(1, len(lengths)) - 4.0 for lengths in found]


def _positive_share(text: str) -> float:
    sentences = [words for part in _SENTENCE.findall(text.lower()) if (words := _WORD.findall(part))]
    if not sentences:
        return 0.0
    return sum(not POSITIVE_WORDS.isdisjoint(words) for words in sentences) / len(sentences)
