"""Demonstrations as token ids, cut where a sampler would have begun and ended them.

The prompt's ids are what a sampler is given: the prompt tokenised alone, special tokens in front, none behind. The
response's ids continue it. Where the tokens of prompt + response begin with the prompt's own, the response is the rest
of them, so it has the tokens of the joint text; where the joint text merges characters across the boundary, which a
sampler cannot do, the response is tokenised alone, without special tokens.

A response that ends by itself ends with EOS, which counts towards `max_response_tokens`, as it does for a sampler. One
that does not fit together with its EOS is cut and has none. If demonstrations and rollouts differed in this, a reward
could tell them apart by it and learn nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .demonstrations import DataError, Demonstration

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizedDemonstration:
    """A demonstration as token ids.

    Args:
        prompt_ids: what a sampler is given, at least one token.
        response_ids: at least one token besides EOS, at most `max_response_tokens` with it.
        truncated: the response was cut, and so has no EOS.
        source: where the demonstration was read.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    truncated: bool
    source: str = field(default="", compare=False)


class TokenizedDemonstrations(list[TokenizedDemonstration]):
    """A list of tokenised demonstrations that knows what was left out: `dropped[reason]` rows for each reason.

    `places` holds, for each that is there, the place of its row among those that were given.
    """

    def __init__(self, rows: Iterable[TokenizedDemonstration], dropped: dict[str, int], places: list[int]) -> None:
        super().__init__(rows)
        self.dropped = dropped
        self.places = places


def tokenize_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: Any,
    *,
    max_response_tokens: int,
    max_prompt_tokens: int | None = None,
    prompt_tokens: int = 32,
    add_eos: bool = True,
) -> TokenizedDemonstrations:
    """Tokenise demonstrations.

    Args:
        rows: demonstrations of any form.
        tokenizer: a transformers tokenizer. Chats go through its chat template.
        max_response_tokens: longer responses are cut here.
        max_prompt_tokens: rows with longer prompts are left out; None keeps them.
        prompt_tokens: how many tokens of a plain text, BOS included, are its prompt.
        add_eos: end a response that is not cut with the tokenizer's EOS. An EOS that the response's text itself spells
            out ends it there.

    Returns:
        A list of the usable rows in their order, with `.dropped`, a count for each reason: "empty response",
        "long prompt", "short text" (no token after the prompt). What was dropped is logged as a warning too.

    Raises:
        DataError: no usable row, a chat without a chat template or one that the template refuses, or an empty prompt
            with a tokenizer that adds no BOS.
        ValueError: a limit out of its range, or add_eos with a tokenizer that has no EOS.
    """
    for name, limit in (
        ("max_response_tokens", max_response_tokens),
        ("max_prompt_tokens", 1 if max_prompt_tokens is None else max_prompt_tokens),
        ("prompt_tokens", prompt_tokens),
    ):
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    eos: int | None = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token, or pass add_eos=False")
    dropped: dict[str, int] = {}
    kept: list[TokenizedDemonstration] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        prompt, response = _ids(row, tokenizer, prompt_tokens)
        if row.is_text and not response:
            reason = "short text"
        elif not response or response[0] == eos:
            reason = "empty response"
        elif max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            reason = "long prompt"
        else:
            if not prompt:
                raise DataError(f"{row.source}: the prompt has no tokens and the tokenizer adds no BOS: give a prompt")
            ids, truncated = _end(response, eos, max_response_tokens, add_eos)
            places.append(place)
            kept.append(
                TokenizedDemonstration(
                    prompt_ids=tuple(prompt), response_ids=tuple(ids), truncated=truncated, source=row.source
                )
            )
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    if dropped:
        counts = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
        if not kept:
            raise DataError(f"none of {len(rows)} demonstrations can be used: {counts}")
        _log.warning("dropped %d of %d demonstrations: %s", sum(dropped.values()), len(rows), counts)
    return TokenizedDemonstrations(kept, dropped, places)


def token_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds, special tokens as they are written; joined they are the text of the whole.

    A character that several tokens spell out is given to the last of them.
    """
    pieces: list[str] = []
    said = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # An unfinished character decodes to U+FFFD, which the next token takes back.
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(said) :] if whole.startswith(said) else "")
        said = whole if whole.startswith(said) else said
    return pieces


def digest(rows: Sequence[TokenizedDemonstration]) -> str:
    """Tells one set of demonstrations, in its order, from another."""
    text = "\n".join(f"{list(row.prompt_ids)} {list(row.response_ids)}" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ids(row: Demonstration, tokenizer: Any, prompt_tokens: int) -> tuple[list[int], list[int]]:
    if row.is_text:
        before, ids = with_leading_special_tokens(row.response, tokenizer)
        ids = before + ids
        return ids[:prompt_tokens], ids[prompt_tokens:]
    if row.messages is None:
        before, prompt = with_leading_special_tokens(row.prompt, tokenizer)
        text = row.prompt
    else:
        text = _render(row, tokenizer)
        before, prompt = [], _encode(text, tokenizer)
    joint = _encode(text + row.response, tokenizer)
    response = joint[len(prompt) :] if joint[: len(prompt)] == prompt else _encode(row.response, tokenizer)
    return before + prompt, response


def _end(response: list[int], eos: int | None, limit: int, add_eos: bool) -> tuple[list[int], bool]:
    """The response with its EOS, or cut at `limit`, and whether it was cut."""
    if eos in response:
        response = response[: response.index(eos)]
    if add_eos and eos is not None:
        response = [*response, eos]
    truncated = len(response) > limit
    return response[:limit], truncated


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def with_leading_special_tokens(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts in front of the text, and the text's own; those behind are dropped.

    Raises:
        DataError: a tokenizer that gives the text other tokens with special tokens than without.
    """
    full = list(tokenizer(text, verbose=False)["input_ids"])
    bare = _encode(text, tokenizer)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start] or _bos(full, bare, tokenizer), bare
    raise DataError(
        f"the tokenizer gives {text[:40]!r} other tokens with special tokens than without: {full} and {bare}"
    )


def _bos(full: list[int], bare: list[int], tokenizer: Any) -> list[int]:
    # With no text, the place of the text among the special tokens cannot be seen.
    return full[:1] if not bare and full[:1] == [tokenizer.bos_token_id] else []


def _render(row: Demonstration, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{row.source}: a chat needs a tokenizer with a chat template: set tokenizer.chat_template, use an "
            "instruction-tuned model's tokenizer, or give the rows as prompt and response"
        )
    import jinja2

    turns = [{"role": turn.role, "content": turn.content} for turn in row.messages or ()]
    try:
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except jinja2.TemplateError as cause:
        raise DataError(f"{row.source}: the tokenizer's chat template refuses the turns: {cause}") from cause
