"""JSON bodies as rows to judge, and scores as JSON.

Two forms are read. slime's (`--rm-type remote_rm`), which is also ours, one object or a list of them:

    {"prompt": a string or chat turns, "response": a string, "label": anything}     ->     a number

and OpenRLHF's (`--reward.remote_url`), where a query is the prompt and its response in one string:

    {"query": [...], "prompts": [...], "labels": [...]}  ->  {"rewards": [...], "scores": [...], "extra_logs": {...}}

Labels are no input of a learned reward: they are accepted and not read, and so are fields of other names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from irlfast.data import DataError, Demonstration
from irlfast.data.demonstrations import chat_turns, required_string
from irlfast.scorer import Score


def parse_json(body: bytes) -> Any:
    """A body's JSON value. DataError: it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise DataError(f"the body is not JSON: {cause}") from cause


def score_rows(value: Any) -> tuple[list[Demonstration], bool]:
    """The rows of a body in slime's form, and whether it is a list of them.

    Raises:
        DataError: not of that form; names the row and the field, what was given and what was expected.
    """
    if isinstance(value, list):
        return [_row(item, f"[{i}]") for i, item in enumerate(value)], True
    return [_row(value, "body")], False


def openrlhf_rows(value: Any) -> list[Demonstration]:
    """The rows of a body in OpenRLHF's form; none where its lists are empty.

    Raises:
        DataError: not of that form, or a query that does not hold its prompt.
    """
    if not isinstance(value, Mapping):
        raise DataError(f'body: expected an object with "query" and "prompts", got {type(value).__name__}')
    queries, prompts = _strings(value, "query"), _strings(value, "prompts")
    if len(queries) != len(prompts):
        raise DataError(f"body: {len(queries)} entries in 'query' and {len(prompts)} in 'prompts', expected as many")
    return [_split(query, prompt, f"[{i}]") for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))]


def openrlhf_answer(scores: Sequence[Score], *, raw: bool) -> dict[str, Any]:
    """As OpenRLHF reads it: `rewards` to train on, `scores` in (0, 1) to filter prompts by, `extra_logs` to log."""
    numbers = [score.served(raw=raw) for score in scores]
    return {
        "rewards": numbers,
        "scores": [(1.0 + math.tanh(number / 2.0)) / 2.0 for number in numbers],  # the sigmoid, which never overflows
        "extra_logs": {"raw_reward": [score.reward for score in scores]},
    }


def _row(value: Any, where: str) -> Demonstration:
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: expected an object with "prompt" and "response", got {type(value).__name__}')
    response = _text(value, "response", where)
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        if not prompt:
            raise DataError(f"{where}: field 'prompt' is a list without turns, expected at least one")
        turns = chat_turns(prompt, "prompt", where)
        for i, turn in enumerate(turns):
            for text in (turn.role, turn.content):
                _encodable(text, f"{where}: field 'prompt', turn {i}")
        return Demonstration(prompt="", response=response, messages=turns, source=where)
    if "prompt" in value and not isinstance(prompt, str):
        kind = type(prompt).__name__
        raise DataError(f"{where}: field 'prompt' must be a string or a list of chat turns, got {kind}")
    return Demonstration(prompt=_text(value, "prompt", where), response=response, source=where)


def _split(query: str, prompt: str, where: str) -> Demonstration:
    # The query is decoded from tokens, in front of which a tokenizer may have put special ones.
    start = query.find(prompt)
    if start < 0:
        raise DataError(
            f"{where}: the query does not hold its prompt, so where the response begins is not known: query "
            f"{query[:60]!r}, prompt {prompt[:60]!r}"
        )
    return Demonstration(prompt=prompt, response=query[start + len(prompt) :], source=where)


def _strings(value: Mapping[str, Any], field: str) -> list[str]:
    if field not in value:
        raise DataError(f"body: field {field!r} is missing; fields found: {sorted(value)}")
    entries = value[field]
    if not isinstance(entries, list):
        raise DataError(f"body: field {field!r} must be a list of strings, got {type(entries).__name__}")
    return [_text({field: entry}, field, f"[{i}]") for i, entry in enumerate(entries)]


def _text(value: Mapping[str, Any], field: str, where: str) -> str:
    text = required_string(value, field, where)
    _encodable(text, f"{where}: field {field!r}")
    return text


def _encodable(text: str, where: str) -> None:
    # JSON can spell half a character, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise DataError(f"{where} has a lone surrogate at character {cause.start}: it is no text") from cause
