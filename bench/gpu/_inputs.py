"""What every case is measured on: labels, masks, fixed upstream gradients, and the rows that are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench._case import Bar, Contender, Truth
from bench.gpu._cases import GpuCase

IGNORED = -100
COPIED_BYTES = 1 << 30
# Beside every op: no rival may be faster.
RIVAL_BARS = tuple(Bar(kind="speedup", against=family, limit=1) for family in ("eager", "compile", "peer"))

# A rival slower than it need be, or that rounds its results to bfloat16, is not wrong.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Labels [N] and what comes back.

    Attributes:
        labels: those of masked rows are ignored.
        plain: with a label in place of those ignored, for who cannot ignore.
        kept: numbers of the rows that are not masked.
        upstream: gradients [N] of each output, 0 in masked rows.
    """

    labels: Tensor
    plain: Tensor
    kept: Tensor
    upstream: tuple[Tensor, ...]


def make_targets(case: GpuCase, vocab: int, outputs: int, device: str) -> Targets:
    """As many upstream gradients as outputs."""
    rows = case.shape[0]
    plain = torch.randint(vocab, (rows,), device=device)
    masked = 100 * torch.arange(rows, device=device) < case.masked * rows
    masked = masked[torch.randperm(rows, device=device)]
    return Targets(
        labels=plain.masked_fill(masked, IGNORED),
        plain=plain,
        kept=(~masked).nonzero().squeeze(1),
        upstream=tuple(torch.randn(rows, device=device).masked_fill(masked, 0.0) for _ in range(outputs)),
    )


def edge_rows(rows: int, device: str) -> Tensor:
    """The first, the last and some between, whose gradients are checked: offsets go wrong at the end."""
    return torch.tensor([*range(4), rows // 2, *range(rows - 3, rows)], device=device).clamp(0, rows - 1).unique()


def only(rows: Tensor, truth: Sequence[Truth]) -> list[Truth]:
    """Truth of all rows, of these alone."""
    return [Truth(name=t.name, value=t.value[rows], select=rows) for t in truth]


def copy_ceiling(nbytes: int, device: str) -> Contender:
    """Copies that read and write as many bytes together: again and again of one buffer, larger than any cache."""
    total = max(1, nbytes // 4)  # bfloat16 read, and as many written
    source = torch.zeros(min(total, COPIED_BYTES // 2), dtype=torch.bfloat16, device=device)
    destination = torch.empty_like(source)

    def run() -> tuple[Tensor]:
        for begin in range(0, total, len(source)):
            count = min(len(source), total - begin)
            destination[:count].copy_(source[:count])
        return (destination,)

    return Contender(name="copy", family="ceiling", run=run, nbytes=nbytes)


def with_softcap(
    form: Callable[[Tensor, Tensor], tuple[Tensor, ...]], softcap: float | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The form of logits that are capped first."""
    if softcap is None:
        return form
    return lambda logits, labels: form(softcap * torch.tanh(logits.float() / softcap), labels)
