"""Inputs that break kernels over a vocabulary, and what their results are held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# With blocks of 64 float32 and 128 16-bit logits, as the fixture `device` sets them: one logit; ragged within a block;
# one block of float32; ragged over two or three blocks. On a GPU, whose blocks are wider, BIG is what crosses them.
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


def near_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """A policy near its reference."""
    logits = random_logits(rows, vocab)
    return logits, logits + 0.3 * torch.randn_like(logits)


def unrelated_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    return random_logits(rows, vocab), random_logits(rows, vocab)


def shifted_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """By 150 up or down, the two of them apart."""
    logits, ref_logits = near_pair(rows, vocab)
    shift = torch.where(torch.arange(rows) % 2 == 0, 150.0, -150.0)[:, None]
    return logits + shift, ref_logits - shift


def masked_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """-inf at the same tokens of both: the first two thirds, or scattered, or all but the last."""
    pair = near_pair(rows, vocab)
    for logits in pair:
        logits[0::3, : 2 * vocab // 3] = -math.inf
        logits[1::3, :-1:2] = -math.inf
        logits[2::3, :-1] = -math.inf
    return pair


def partly_masked_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """-inf in one of the two: KL is infinite one way and finite the other."""
    logits, ref_logits = near_pair(rows, vocab)
    logits[0::2, : vocab // 2] = -math.inf
    ref_logits[1::2, : vocab // 2] = -math.inf
    return logits, ref_logits


def certain_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """One token 25 nats above the rest in both."""
    pair = near_pair(rows, vocab)
    for logits in pair:
        logits.clamp_(-2, 2)
        logits[torch.arange(rows), torch.arange(rows) * 37 % vocab] = 27.0
    return pair


def rising_pair(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Every block raises one maximum or both."""
    up = torch.linspace(-20, 20, vocab, dtype=torch.float64).expand(rows, vocab)
    noise = torch.randn(rows, vocab, dtype=torch.float64) * 0.3
    return up + noise, torch.where(torch.arange(rows)[:, None] % 2 == 0, up.flip(-1) * 0.2, up)


PAIRS: list[Callable[[int, int], tuple[Tensor, Tensor]]] = [
    near_pair,
    unrelated_pair,
    shifted_pair,
    masked_pair,
    partly_masked_pair,
    certain_pair,
    rising_pair,
]
