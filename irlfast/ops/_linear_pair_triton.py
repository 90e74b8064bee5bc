"""The Triton work on a chunk of two models' logits, and linear_policy_ref_stats on a GPU with it: nothing waits for the
device, and what only the data can tell is not checked, as in _linear_triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from irlfast.ops._linear import Epilogue, Rows, Upstream
from irlfast.ops._linear_pair import Models, Outputs, backward_pair, forward_pair
from irlfast.ops._linear_triton import (
    TritonEpilogue,
    chunk_block,
    contiguous,
    known_temperature,
    launch_options,
)
from irlfast.ops._triton import Block, on_device


class TritonPairEpilogue:
    """See `irlfast.ops._linear_pair.PairEpilogue`. `block` replaces what the tuning table says, for tests."""

    compacts = False

    def __init__(self, vocab: int, ignore_index: int, block: Block | None = None) -> None:
        self.vocab = vocab
        self.ignore_index = ignore_index
        self.block = block
        self.alone: Epilogue = TritonEpilogue(vocab, ignore_index, block)

    def merge(self, logits: Tensor, ref_logits: Tensor, first_column: int, rows: Rows, running: Tensor) -> None:
        from irlfast.kernels.linear_policy_ref_stats import linear_policy_ref_stats_merge

        block = self.block or chunk_block("linear_policy_ref_stats", logits)
        if len(logits):
            with on_device(logits):
                linear_policy_ref_stats_merge[(len(logits),)](
                    logits,
                    ref_logits,
                    rows.labels,
                    rows.row_temperature,
                    running,
                    logits.stride(0),
                    ref_logits.stride(0),
                    running.stride(0),
                    first_column,
                    logits.shape[1],
                    self.vocab,
                    self.ignore_index,
                    rows.temperature,
                    rows.softcap,
                    **launch_options(block, rows),
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
        from irlfast.kernels.linear_policy_ref_stats import linear_policy_ref_stats_differentiate

        block = self.block or chunk_block("linear_policy_ref_stats", logits)
        if len(out):
            with on_device(logits):
                linear_policy_ref_stats_differentiate[(len(out),)](
                    logits,
                    ref_logits,
                    rows.labels,
                    rows.row_temperature,
                    running,
                    *contiguous(upstream),
                    out,
                    logits.stride(0),
                    ref_logits.stride(0),
                    out.stride(0),
                    running.stride(0),
                    first_column,
                    logits.shape[1],
                    self.ignore_index,
                    rows.temperature,
                    rows.softcap,
                    **launch_options(block, rows),
                )


def forward_triton(*arguments: Any) -> Outputs:
    """The registered op; arguments as it is defined."""
    return forward_pair(*_start(*arguments))


def backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op's gradient."""
    *shared, running, logprob, entropy, lse, reverse_kl, forward_kl, needs = arguments
    upstream = Upstream(logprob, entropy, lse, reverse_kl, forward_kl)
    return backward_pair(*_start(*shared), running, upstream, needs)


def _start(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    chunk: int,
) -> tuple[TritonPairEpilogue, Tensor, Models, Rows, int, int]:
    row_temperature = known_temperature(row_temperature, labels, ignore_index)
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap, ref_hidden)
    models = Models(weight, bias, ref_weight, ref_bias)
    return TritonPairEpilogue(weight.shape[0], ignore_index), hidden, models, rows, ignore_index, chunk
