"""Where the response tokens of a packed slime batch stand in the logits of this rank.

slime packs the samples of a micro-batch one after the other, prompt and response, into logits [1, T, V]; the logits at
position p are of the token at p + 1. With context parallelism over C ranks each sample is cut into 2 C chunks of equal
size, of which rank c has chunks c and 2 C - 1 - c, one after the other (the zigzag of ring attention), the last ones
padded. Everything a batch holds a number a response token of (old log-probs, advantages) is cut the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Parallel(NamedTuple):
    """What this rank has of a sample: vocab_group, over whose ranks the vocabulary is split, or None; and its place
    among `context_size` ranks that share each sequence."""

    vocab_group: Any = None
    context_rank: int = 0
    context_size: int = 1

    @classmethod
    def of(cls, args: Any) -> Parallel:
        """As slime was launched; Megatron is asked only where something is split.

        Raises:
            NotImplementedError: context parallelism by --allgather-cp, whose pieces are cut in another way.
        """
        tensor_size = getattr(args, "tensor_model_parallel_size", 1)
        context_size = getattr(args, "context_parallel_size", 1)
        if tensor_size == context_size == 1:
            return cls()
        if context_size > 1 and getattr(args, "allgather_cp", False):
            raise NotImplementedError(
                f"context_parallel_size = {context_size} with --allgather-cp: irlfast's loss knows the zigzag layout "
                "alone. Leave --allgather-cp out, or use --loss-type policy_loss"
            )
        from megatron.core import mpu

        return cls(
            mpu.get_tensor_model_parallel_group() if tensor_size > 1 else None,
            mpu.get_context_parallel_rank() if context_size > 1 else 0,
            context_size,
        )


class Span(NamedTuple):
    """`length` response tokens of one sample, from `token` on, whose logits begin at `row` of this rank's."""

    row: int
    token: int
    length: int


def response_spans(
    total_lengths: Sequence[int], response_lengths: Sequence[int], parallel: Parallel
) -> tuple[list[list[Span]], int]:
    """The spans of each sample, in the order of its tokens, and how many rows of logits the samples take.

    Raises:
        ValueError: a response that is as long as its sample: nothing gives the logits of its first token.
    """
    spans: list[list[Span]] = []
    base = 0
    for index, (total, response) in enumerate(zip(total_lengths, response_lengths, strict=True)):
        if not 0 <= response < total:
            raise ValueError(
                f"sample {index} has {total} tokens, {response} of them response; expected at least one token of prompt"
            )
        if parallel.context_size == 1:
            pieces = [(0, total)]
        else:
            parts = 2 * parallel.context_size
            size = -(-total // parts)
            first, second = parallel.context_rank, parts - 1 - parallel.context_rank
            pieces = [(first * size, size), (second * size, size)]
        found = []
        for start, length in pieces:
            # The logits at p predict the token at p + 1.
            low, high = max(start, total - response - 1), min(start + length, total - 1)
            if low < high:
                found.append(Span(base + low - start, low + 1, high - low))
            base += length
        spans.append(found)
    return spans, base


def packed_labels(spans: Sequence[Sequence[Span]], tokens: Sequence[Tensor], rows: int, device: torch.device) -> Tensor:
    """[rows] the token that each row of logits has to predict, IGNORED outside of responses."""
    labels = torch.full((rows,), IGNORED, dtype=torch.int64, device=device)
    for sample, found in zip(tokens, spans, strict=True):
        for row, token, length in found:
            labels[row : row + length] = sample[token : token + length]
    return labels


def response_values(values: Tensor, spans: Sequence[Sequence[Span]]) -> list[Tensor]:
    """Of `values` [T], one for each row of logits, those of each sample's response tokens."""
    return [
        torch.cat([values[row : row + length] for row, _, length in found]) if found else values[:0] for found in spans
    ]


def local_values(values: Tensor, span: Sequence[Span], prompt_length: int) -> Tensor:
    """Of `values` [R], one for each token of a whole response, those that this rank has."""
    starts = [(token - prompt_length, length) for _, token, length in span]
    return torch.cat([values[start : start + length] for start, length in starts]) if starts else values[:0]
