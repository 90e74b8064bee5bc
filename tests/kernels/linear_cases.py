"""Inputs of the linear ops that make logits which break kernels over chunks of a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton_cases import random_logits

PIECE = 2048
# One logit; one whole chunk; two and a ragged third. With the interpreter's blocks of 512 float32, the last ends in a
# ragged block.
VOCABULARIES = [1, PIECE, 2 * PIECE + 104]
DTYPES = [torch.float32, torch.bfloat16]


class Problem(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V)
    labels: Tensor  # (N)

    def to(self, place: str | torch.dtype) -> Problem:
        """On a device, or in a dtype."""
        tensors = (self.hidden.to(place), self.weight.to(place), self.bias.to(place))
        return Problem(*tensors, self.labels if isinstance(place, torch.dtype) else self.labels.to(place))

    def take(self, rows: slice) -> Problem:
        return self._replace(hidden=self.hidden[rows], labels=self.labels[rows])


def unmasked(vocab: int) -> Tensor:
    return torch.randn(vocab, dtype=torch.float64)


def whole_chunk_masked(vocab: int) -> Tensor:
    """-inf over the first two thirds: the first chunk has nothing else."""
    bias = unmasked(vocab)
    bias[: 2 * vocab // 3] = -math.inf
    return bias


def scattered_masked(vocab: int) -> Tensor:
    bias = unmasked(vocab)
    bias[:-1:2] = -math.inf
    return bias


def all_but_last_masked(vocab: int) -> Tensor:
    bias = unmasked(vocab)
    bias[:-1] = -math.inf
    return bias


BIASES = [unmasked, whole_chunk_masked, scattered_masked, all_but_last_masked]


def problem(
    make: Callable[[int, int], Tensor] = random_logits,
    vocab: int = VOCABULARIES[-1],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    rows: int = 5,
    bias: Callable[[int], Tensor] = unmasked,
) -> Problem:
    """Logits that `make` gives, plus some of random hidden states, plus a bias.

    A label in each chunk, as far as there are rows for them; the second row is ignored.
    """
    torch.manual_seed(vocab)
    hidden = torch.cat([torch.eye(rows, dtype=torch.float64), torch.randn(rows, 8, dtype=torch.float64)], 1)
    weight = torch.cat([make(rows, vocab).t(), torch.randn(vocab, 8, dtype=torch.float64) * 0.1], 1)
    labels = (vocab - 1 - torch.arange(rows) * (PIECE - 1)) % vocab
    if rows > 1:
        labels[1] = -100
    return Problem(hidden, weight, bias(vocab), labels).to(dtype).to(device)
