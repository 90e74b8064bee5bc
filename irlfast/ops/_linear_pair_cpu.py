"""The native work on a chunk of two models' logits on the CPU. `isa` names the instruction set to use, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES, address
from irlfast.ops._linear import Epilogue, Rows, Upstream
from irlfast.ops._linear_cpu import CpuEpilogue
from irlfast.ops._linear_pair import RUNNING


class CpuPairEpilogue:
    """See `irlfast.ops._linear_pair.PairEpilogue`."""

    compacts = True

    def __init__(self, isa: str = "auto") -> None:
        assert _native.PAIR_RUNNING == RUNNING
        self.isa = isa
        self.alone: Epilogue = CpuEpilogue(isa)

    def merge(self, logits: Tensor, ref_logits: Tensor, first_column: int, rows: Rows, running: Tensor) -> None:
        _native.linear_policy_ref_stats_merge(
            *_chunk(logits, ref_logits, first_column, rows, running), torch.get_num_threads(), self.isa
        )

    def differentiate(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        first_column: int,
        rows: Rows,
        running: Tensor,
        upstream: Upstream,
        out: Tensor,
    ) -> None:
        received = [None if g is None else g.contiguous() for g in upstream]  # alive until the call returns
        grad_logprob, grad_entropy, grad_lse, grad_reverse_kl, grad_forward_kl = map(address, received)
        _native.linear_policy_ref_stats_differentiate(
            *_chunk(logits, ref_logits, first_column, rows, running),
            grad_logprob,
            grad_entropy,
            grad_lse,
            grad_reverse_kl,
            grad_forward_kl,
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.stride(0),
            torch.get_num_threads(),
            self.isa,
        )


def _chunk(
    logits: Tensor, ref_logits: Tensor, first_column: int, rows: Rows, running: Tensor
) -> tuple[int, int, int, int, int, int, int, int, int, float, int, float, int, int]:
    return (
        logits.data_ptr(),
        logits.stride(0),
        ref_logits.data_ptr(),
        ref_logits.stride(0),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        first_column,
        logits.shape[1],
        rows.labels.data_ptr(),
        rows.temperature,
        address(rows.row_temperature),
        rows.softcap,
        running.data_ptr(),
        running.stride(0),
    )
