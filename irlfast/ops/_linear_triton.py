"""The Triton work on a chunk of logits, and linear_token_stats on a GPU with it: nothing here waits for the device.

What only the data can tell is not checked: a row with a label outside the vocabulary, or with a temperature that is no
positive number, is NaN, and with it the gradients that it takes part in.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_fused_triton import forward_fused
from irlfast.ops._linear_modes import Outputs, backward_chunked, forward_chunked
from irlfast.ops._triton import Block, block_for, on_device


class TritonEpilogue:
    """See `irlfast.ops._linear.Epilogue`.

    `block`, which divides a piece, replaces what the tuning table says, for tests.
    """

    compacts = False

    def __init__(self, vocab: int, ignore_index: int, block: Block | None = None) -> None:
        self.vocab = vocab
        self.ignore_index = ignore_index
        self.block = block

    def merge(self, logits: Tensor, first_column: int, rows: Rows, running: Tensor, *, weighted: bool) -> None:
        from irlfast.kernels.linear_token_stats import linear_token_stats_merge

        block = self.block or chunk_block("linear_token_stats", logits)
        if len(logits):
            with on_device(logits):
                linear_token_stats_merge[(len(logits),)](
                    logits,
                    rows.labels,
                    rows.row_temperature,
                    running,
                    logits.stride(0),
                    running.stride(0),
                    first_column,
                    logits.shape[1],
                    self.vocab,
                    self.ignore_index,
                    rows.temperature,
                    rows.softcap,
                    weighted,
                    **launch_options(block, rows),
                )

    def exponentials(self, logits: Tensor, first_column: int, rows: Rows, maximum: Tensor, out: Tensor) -> None:
        from irlfast.kernels.linear_token_stats import linear_token_stats_exponentials

        block = self.block or chunk_block("linear_token_stats", logits)
        if len(out):
            with on_device(logits):
                linear_token_stats_exponentials[(len(out),)](
                    logits,
                    rows.labels,
                    rows.row_temperature,
                    maximum,
                    out,
                    logits.stride(0),
                    out.stride(0),
                    first_column,
                    logits.shape[1],
                    self.ignore_index,
                    rows.temperature,
                    rows.softcap,
                    **launch_options(block, rows),
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
        from irlfast.kernels.linear_token_stats import linear_token_stats_differentiate

        block = self.block or chunk_block("linear_token_stats", logits)
        if len(out):
            with on_device(logits):
                linear_token_stats_differentiate[(len(out),)](
                    logits,
                    rows.labels,
                    rows.row_temperature,
                    state,
                    row_numbers,
                    *contiguous(upstream)[:3],
                    out,
                    logits.stride(0),
                    out.stride(0),
                    state.stride(0),
                    first_column,
                    logits.shape[1],
                    self.ignore_index,
                    rows.temperature,
                    rows.softcap,
                    **launch_options(block, rows),
                )


def chunk_block(kernel: str, logits: Tensor) -> Block:
    """The tuning table's configuration for a chunk."""
    return block_for(kernel, logits.device.index, logits.element_size(), logits.shape[1])


def launch_options(block: Block, rows: Rows) -> dict[str, Any]:
    """What all launches on chunks end in."""
    return {
        "SOFTCAP": rows.softcap != 0.0,
        "BLOCK": block.lanes * block.vector,
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
        "enable_fp_fusion": True,
    }


def contiguous(upstream: Upstream) -> Upstream:
    """Gradients of a sum are one number expanded, which the kernels do not step over."""
    return Upstream(*(None if g is None else g.contiguous() for g in upstream))


def known_temperature(row_temperature: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """That of an ignored row is not looked at."""
    return None if row_temperature is None else row_temperature.masked_fill(labels == ignore_index, 1.0)


def forward_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    *rest: Any,
) -> Outputs:
    """The registered op."""
    temperature, softcap, ignore_index, mode, _ = rest
    row_temperature = known_temperature(row_temperature, labels, ignore_index)
    if mode == "fused":
        return forward_fused(hidden, weight, bias, labels, row_temperature, temperature, softcap, ignore_index)
    epilogue = TritonEpilogue(weight.shape[0], ignore_index)
    return forward_chunked(epilogue, hidden, weight, bias, labels, row_temperature, *rest)


def backward_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op's gradient."""
    _, _, ignore_index, *_ = rest
    row_temperature = known_temperature(row_temperature, labels, ignore_index)
    epilogue = TritonEpilogue(weight.shape[0], ignore_index)
    return backward_chunked(epilogue, hidden, weight, bias, labels, row_temperature, *rest)
