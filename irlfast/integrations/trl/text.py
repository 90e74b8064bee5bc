"""Between what TRL hands a reward function (texts or chats, and token ids) and sequences of token ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from irlfast.data import DataError, Demonstration, TokenizedDemonstration, tokenize_demonstrations

Prompt = str | list[dict[str, str]]
_log = logging.getLogger(__name__)


def prompt_token_ids(
    prompts: Sequence[Prompt], tokenizer: Any, template: Mapping[str, Any] | None = None
) -> list[tuple[int, ...]]:
    """Token ids of prompts as TRL makes them: its trainers tell a reward function those of the completions alone.

    Args:
        prompts: texts, or chats as lists of {"role", "content"}.
        tokenizer: the trainer's processing_class.
        template: the trainer's args.chat_template_kwargs.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        ids = tokenizer(text=list(prompts))["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            conversation=list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(template or {})
        )["input_ids"]
    return [tuple(row) for row in ids]


def check_completions(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """The completions' ids, where they are single text answers that can be judged.

    Raises:
        ValueError: ids that are missing or do not fit, an empty completion, or one that is more than an answer in text.
    """
    if completion_ids is None:
        raise ValueError(
            "completion_ids is missing: the reward judges token ids, EOS among them, which decoded completions lack. "
            "Trainers of TRL pass them; pass them on where another function stands between"
        )
    if not len(prompts) == len(completions) == len(completion_ids):
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} completions, {len(completion_ids)} completion_ids: one each"
        )
    for row, (completion, ids) in enumerate(zip(completions, completion_ids, strict=True)):
        if not len(ids):
            raise ValueError(f"completion {row} has no tokens: not even EOS was sampled")
        if isinstance(completion, str):
            continue
        if len(completion) != 1 or completion[0].get("tool_calls") or not isinstance(completion[0]["content"], str):
            raise ValueError(
                f"completion {row} is no single answer in text but {completion!r}: tokens that tools or images put in "
                "were not sampled by the policy and cannot be judged as its own"
            )
    return completion_ids


def demonstrations_for_trl(
    rows: Sequence[Demonstration],
    tokenizer: Any,
    *,
    max_completion_length: int,
    prompt_tokens: int = 32,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[TokenizedDemonstration], list[Prompt]]:
    """Demonstrations, and the prompts of a data set that TRL will tokenise to the same ids.

    A plain text is cut in the middle of what it says, and its first tokens are decoded to a prompt; where TRL would not
    make the same tokens of it again, the row is left out, and a warning says how many were.

    Args:
        rows: pairs, chats or plain texts.
        tokenizer: the trainer's processing_class.
        max_completion_length: of the trainer; longer responses are cut there, as the sampler's are.
        prompt_tokens: how many tokens of a plain text are its prompt.
        chat_template_kwargs: of the trainer.

    Returns:
        (demonstrations, prompts): the latter each once, in their order, for the column "prompt" of a data set.

    Raises:
        DataError: no row is left.
    """
    tokenized = tokenize_demonstrations(
        rows, tokenizer, max_response_tokens=max_completion_length, prompt_tokens=prompt_tokens
    )
    texts = [
        _prompt(rows[place], demonstration, tokenizer)
        for place, demonstration in zip(tokenized.places, tokenized, strict=True)
    ]
    ids: dict[int, tuple[int, ...]] = {}
    for kind in (str, list):
        chosen = [index for index, text in enumerate(texts) if isinstance(text, kind)]
        made = prompt_token_ids([texts[index] for index in chosen], tokenizer, chat_template_kwargs)
        ids.update(zip(chosen, made, strict=True))
    kept = [index for index, demonstration in enumerate(tokenized) if ids[index] == demonstration.prompt_ids]
    if len(kept) < len(tokenized):
        left_out = len(tokenized) - len(kept)
        _log.warning("left out %d of %d rows: TRL makes other tokens of their prompts", left_out, len(tokenized))
    if not kept:
        raise DataError(
            f"none of {len(tokenized)} prompts is tokenised by TRL as here: TRL calls tokenizer(text=prompt), or "
            f"apply_chat_template; the first one gives {ids[0]} there and {tokenized[0].prompt_ids} here"
        )
    distinct = {ids[index]: texts[index] for index in reversed(kept)}
    return [tokenized[index] for index in kept], list(reversed(distinct.values()))


def _prompt(row: Demonstration, demonstration: TokenizedDemonstration, tokenizer: Any) -> Prompt:
    if row.messages is not None:
        return [{"role": turn.role, "content": turn.content} for turn in row.messages]
    if not row.is_text:
        return row.prompt
    return str(tokenizer.decode(list(demonstration.prompt_ids), skip_special_tokens=True))
