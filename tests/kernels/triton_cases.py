"""Inputs that break kernels over a vocabulary, and what their results are held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# With blocks of 32 float32 and 64 16-bit logits, as the fixture `device` sets them: shorter than a load; one block of
# either; ragged over several blocks of either. On a GPU, whose blocks are wider, BIG is what crosses them.
VOCABULARIES = [1, 7, 64, 131]
BIG = [4093, 50257, 128256]


def random_logits(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab, dtype=torch.float64) * 3


def shifted_logits(rows: int, vocab: int) -> Tensor:
    """By 150 up and down in turn."""
    return random_logits(rows, vocab) + torch.where(torch.arange(rows) % 2 == 0, 150.0, -150.0)[:, None]


def masked_logits(rows: int, vocab: int) -> Tensor:
    """-inf over the first two thirds, which is more than a block; over scattered ones; over everything but the last."""
    logits = random_logits(rows, vocab)
    logits[0::3, : 2 * vocab // 3] = -math.inf
    logits[1::3, :-1:2] = -math.inf
    logits[2::3, :-1] = -math.inf
    return logits


def certain_logits(rows: int, vocab: int) -> Tensor:
    """One token 40 nats above the rest: 1 - p is about vocab * 1e-17."""
    logits = torch.randn(rows, vocab, dtype=torch.float64).clamp(-2, 2)
    logits[torch.arange(rows), torch.arange(rows) * 37 % vocab] = 42.0
    return logits


def tied_logits(rows: int, vocab: int) -> Tensor:
    """Few different values, so that each row has its maximum many times."""
    return torch.randint(-1, 2, (rows, vocab)).double()


LOGITS: list[Callable[[int, int], Tensor]] = [
    random_logits,
    shifted_logits,
    masked_logits,
    certain_logits,
    tied_logits,
]


# What rounding to a dtype may change, of a value; to nearest.
_HALF_SPACING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def error(ours: Tensor, exact: Tensor, relative: float = 0.0) -> float:
    """Largest absolute difference, less that share of the value; equal infinities agree, and so do NaNs."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    difference = ((ours - exact).abs() - relative * exact.abs()).masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def rounding(dtype: torch.dtype, device: str) -> float:
    """The relative error that rounding to a dtype makes: to nearest, but the interpreter cuts bfloat16 off."""
    return _HALF_SPACING[dtype] * (2 if device == "cpu" and dtype == torch.bfloat16 else 1)
