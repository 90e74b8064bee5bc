"""Demonstrations for a training command: rows to learn from, rows that choose, rows held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from irlfast.data import TokenizedDemonstration, load_demonstrations, split, tokenize_demonstrations
from irlfast.train.config import require
from irlfast.train.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How demonstrations are read and cut."""

    prompt_field: str = "prompt"
    """Field of a row that holds the prompt."""
    response_field: str = "response"
    """Field of a row that holds the response."""
    text_field: str = "text"
    """Field of a row of plain text; its first `prompt_tokens` tokens are the prompt, the rest the demonstration."""
    prompt_tokens: int = 32
    """Prompt length of plain text, in tokens, BOS included."""
    max_prompt_tokens: int | None = None
    """Rows with longer prompts are left out and counted."""
    dataset_split: str = "train"
    """Split to read where the demonstrations are a Hugging Face dataset."""
    limit: int | None = None
    """Read so many rows at most."""
    heldout: int = 128
    """Rows kept apart for evaluation; none of their prompts is trained on."""

    def __post_init__(self) -> None:
        require(self.heldout >= 1, "data.heldout", self.heldout, "at least 1 row")


class Rows(NamedTuple):
    """Rows to learn from, rows of the same kind that choose among what was learned, and held-out rows."""

    training: list[TokenizedDemonstration]
    validation: list[TokenizedDemonstration]
    heldout: list[TokenizedDemonstration]


def read_rows(source: str, data: DataConfig, tokenizer: Any, *, max_response_tokens: int, seed: int) -> Rows:
    """Read, part and tokenise demonstrations. A prompt that is held out is in neither of the other parts."""
    rows = load_demonstrations(
        source,
        prompt_field=data.prompt_field,
        response_field=data.response_field,
        text_field=data.text_field,
        split=data.dataset_split,
        limit=data.limit,
    )
    rest, heldout = split(rows, heldout_count=data.heldout, seed=derive_seed(seed, "held-out rows", 0))
    training, validation = split(rest, heldout_fraction=0.1, seed=derive_seed(seed, "validation rows", 0))
    parts = [
        tokenize_demonstrations(
            part,
            tokenizer,
            max_response_tokens=max_response_tokens,
            max_prompt_tokens=data.max_prompt_tokens,
            prompt_tokens=data.prompt_tokens,
        )
        for part in (training, validation, heldout)
    ]
    # Different texts may begin alike: a prompt that is evaluated is not trained on, whatever follows it.
    unseen = {row.prompt_ids for row in parts[2]}
    learned = [[row for row in part if row.prompt_ids not in unseen] for part in parts[:2]]
    return Rows(learned[0], learned[1], parts[2])
