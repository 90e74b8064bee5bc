"""Answers of a tuned model and of its base to the same prompts, from which the tuned model's reward is extracted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irlfast.data import TokenizedDemonstration
from irlfast.data.preference_rows import BASE, SPLITS, TUNED
from irlfast.data.preferences import split_by_key
from irlfast.rewards.text import TextReward
from irlfast.rollout import RolloutEngine, SamplingParams

from .evaluation import response_tokens
from .seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt's token ids, its text, and its place among the prompts."""

    ids: tuple[int, ...]
    text: str
    key: int


def distinct_prompts(rows: Sequence[TokenizedDemonstration], tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """The first `limit` different prompts of demonstrations, in their order."""
    ids = list(dict.fromkeys(row.prompt_ids for row in rows))[:limit]
    texts = tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)
    return [Prompt(ids=row, text=str(text), key=i) for i, (row, text) in enumerate(zip(ids, texts, strict=True))]


def sample_pairs(
    prompts: Sequence[Prompt],
    engines: dict[str, RolloutEngine],
    tokenizer: Any,
    sampling: SamplingParams,
    *,
    fractions: tuple[float, float, float],
    seed: int,
    score: TextReward | None = None,
    batch_size: int = 64,
) -> Iterator[dict[str, Any]]:
    """Rows {prompt, response, source, prompt_id, split} and, with `score`, score; those of one prompt stand together.

    Args:
        prompts: what both answer.
        engines: "tuned" and "base".
        tokenizer: turns tokens into text, special tokens left out.
        sampling: its n is the answers of each model to a prompt; its seed is replaced.
        fractions: shares of train, validation and test; a prompt's rows are all in one.
        seed: of the sampling and the split.
        score: a ground truth, to be written beside each answer.
        batch_size: prompts sampled at a time.

    Raises:
        ValueError: engines other than those two.
    """
    if set(engines) != {TUNED, BASE}:
        raise ValueError(f"engines are {sorted(engines)}; expected {TUNED!r} and {BASE!r}")
    parts = split_by_key(prompts, fractions, derive_seed(seed, "pairs split", 0))
    split_of = {p.key: name for name in SPLITS for p in getattr(parts, name)}
    for low in range(0, len(prompts), batch_size):
        part = prompts[low : low + batch_size]
        rows: list[dict[str, Any]] = []
        for source, engine in engines.items():
            params = replace(sampling, seed=derive_seed(seed, f"pairs {source}", low // batch_size))
            samples = engine.generate([list(p.ids) for p in part], params)
            texts = tokenizer.batch_decode(response_tokens(samples), skip_special_tokens=True)
            for place, text in enumerate(texts):
                prompt = part[place // sampling.n]
                rows.append(
                    {
                        "prompt": prompt.text,
                        "response": str(text),
                        "source": source,
                        "prompt_id": prompt.key,
                        "split": split_of[prompt.key],
                    }
                )
        if score is not None:
            scores = score([row["prompt"] for row in rows], [row["response"] for row in rows])
            for row, value in zip(rows, scores, strict=True):
                row["score"] = float(value)
        yield from sorted(rows, key=lambda row: int(row["prompt_id"]))


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write JSON lines, whole or not at all; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    temporary.replace(path)
    return count
