"""Answers of preferences as a frozen language model sees them: each distinct one is read once, then only looked up."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from irlfast.data import Demonstration, Preference, tokenize_demonstrations
from irlfast.rewards import ReaderConfig, pool, read
from irlfast.rollout import Sequences

from .config import require

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How answers are cut and pooled."""

    max_prompt_tokens: int = 256
    """Of a longer prompt the last so many tokens are kept."""
    max_response_tokens: int = 256
    """A longer answer is cut after so many."""
    full_text: bool = False
    """Pool over prompt and answer; by default over the answer alone."""
    batch_size: int = 64
    """Answers in one pass of the language model."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
            require(getattr(self, name) >= 1, f"reading.{name}", getattr(self, name), "at least 1")


class Pairs(NamedTuple):
    """Pairs as rows of Answers: chosen [P], rejected [P], prompt [P], int64; rows of one prompt share a number."""

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """R distinct answers.

    Args:
        features: [R, F] pooled hidden states, not standardised.
        logprobs: [R] log-prob of each answer under the model that read it, nats.
        lengths: [R] tokens, EOS included.
        rows: where (prompt, answer) stands; those that could not be tokenised are missing.
    """

    features: Tensor
    logprobs: Tensor
    lengths: Tensor
    rows: dict[tuple[str, str], int]

    def pairs(self, preferences: Sequence[Preference]) -> tuple[Pairs, list[Preference]]:
        """The preferences whose two answers are here: their rows, and they themselves, in their order."""
        kept = [p for p in preferences if (p.prompt, p.chosen) in self.rows and (p.prompt, p.rejected) in self.rows]
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(p.prompt for p in kept))}
        columns = (
            [self.rows[p.prompt, p.chosen] for p in kept],
            [self.rows[p.prompt, p.rejected] for p in kept],
            [prompts[p.prompt] for p in kept],
        )
        return Pairs(*(torch.tensor(column, dtype=torch.int64) for column in columns)), kept


@torch.no_grad()
def read_answers(
    model: nn.Module,
    tokenizer: Any,
    preferences: Iterable[Preference],
    source: ReaderConfig,
    *,
    pooling: str | Sequence[str] = "mean",
    config: ReadingConfig | None = None,
) -> Answers:
    """Every distinct answer of `preferences`, read by `model`.

    Args:
        model: a causal language model, which is left as it is.
        tokenizer: its tokenizer.
        preferences: of every split.
        source: which of the model's hidden states, with or without token statistics.
        pooling: as for irlfast.rewards.pool.
        config: how answers are cut; by default ReadingConfig().

    Raises:
        DataError: no answer can be used.
    """
    config = config or ReadingConfig()
    texts = list(dict.fromkeys((p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)))
    rows = [Demonstration(prompt=prompt, response=text, source=str(i)) for i, (prompt, text) in enumerate(texts)]
    tokenized = tokenize_demonstrations(rows, tokenizer, max_response_tokens=config.max_response_tokens)
    # Rows of one length waste nothing on padding.
    order = sorted(tokenized, key=lambda row: len(row.prompt_ids[-config.max_prompt_tokens :]) + len(row.response_ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    features, logprobs, lengths = [], [], []
    was_training = model.training
    model.eval()
    for low in range(0, len(order), config.batch_size):
        part = order[low : low + config.batch_size]
        batch = Sequences.from_token_lists(
            [list(row.prompt_ids[-config.max_prompt_tokens :]) for row in part],
            [list(row.response_ids) for row in part],
            pad,
        ).to(device)
        reading = read(model, batch.input_ids, batch.attention_mask, batch.response_mask, source)
        mask = batch.attention_mask if config.full_text else batch.response_mask
        features.append(pool(reading.hidden_states, mask, pooling).cpu())
        logprobs.append(reading.stats.logprob.double().sum(1).float().cpu())
        lengths.append(batch.response_lengths.cpu())
    model.train(was_training)
    return Answers(
        features=torch.cat(features),
        logprobs=torch.cat(logprobs),
        lengths=torch.cat(lengths),
        rows={texts[int(row.source)]: i for i, row in enumerate(order)},
    )
