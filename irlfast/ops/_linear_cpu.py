"""The native work on a chunk of logits on the CPU. `isa` names the instruction set to use, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES, address
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._token_stats_cpu import raise_label


class CpuEpilogue:
    """See `irlfast.ops._linear.Epilogue`."""

    compacts = True

    def __init__(self, isa: str = "auto") -> None:
        self.isa = isa

    def merge(self, logits: Tensor, first_column: int, rows: Rows, running: Tensor, *, weighted: bool) -> None:
        _native.linear_token_stats_merge(
            *_chunk(logits, len(logits), first_column, rows),
            running.data_ptr(),
            running.stride(0),
            weighted,
            torch.get_num_threads(),
            self.isa,
        )

    def exponentials(self, logits: Tensor, first_column: int, rows: Rows, maximum: Tensor, out: Tensor) -> None:
        _native.linear_token_stats_exponentials(
            *_chunk(logits, len(logits), first_column, rows),
            maximum.data_ptr(),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.stride(0),
            torch.get_num_threads(),
            self.isa,
        )

    def differentiate(
        self,
        logits: Tensor,
        first_column: int,
        rows: Rows,
        state: Tensor,
        upstream: Upstream,
        out: Tensor,
        *,
        row_numbers: Tensor | None,
    ) -> None:
        state = state[:3].contiguous()
        upstream = Upstream(*(None if g is None else g.contiguous() for g in upstream))
        _native.linear_token_stats_differentiate(
            *_chunk(logits, len(out), first_column, rows),
            address(row_numbers),
            state.data_ptr(),
            address(upstream.logprob),
            address(upstream.entropy),
            address(upstream.lse),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.stride(0),
            torch.get_num_threads(),
            self.isa,
        )


def _chunk(
    logits: Tensor, count: int, first_column: int, rows: Rows
) -> tuple[int, int, int, int, int, int, int, float, int, float]:
    return (
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        logits.stride(0),
        count,
        first_column,
        logits.shape[1],
        rows.labels.data_ptr(),
        rows.temperature,
        address(rows.row_temperature),
        rows.softcap,
    )


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a label that is out of range."""
    labels = labels.long().contiguous()
    wrong = _native.first_invalid_label(labels.data_ptr(), labels.numel(), vocab, ignore_index)
    if wrong >= 0:
        raise_label(labels, wrong, vocab, ignore_index)
