"""token_stats over a vocabulary that is split over the ranks of a group, by the epilogues of the linear ops: a rank's
logits are one chunk, and their gradient stays on the rank. See `_vocabulary` for what the ranks exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from irlfast.ops._dispatch import Implementation, cpu_kernel_unavailable, select, statistics_dtype
from irlfast.ops._linear import Epilogue, Rows, Upstream, finish
from irlfast.ops._linear_cpu import CpuEpilogue
from irlfast.ops._linear_inputs import split_temperature
from irlfast.ops._linear_modes import idle_rows
from irlfast.ops._linear_triton import TritonEpilogue
from irlfast.ops._triton import triton_unavailable
from irlfast.ops._vocabulary import IGNORED, Slice, SlicedEpilogue, agree, check_rows, describe


class _TokenStatsParallel(torch.autograd.Function):
    """logprob, entropy and lse [N] of all ranks' columns; labels as `Slice.localise` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        epilogue: Epilogue,
        part: Slice,
        logits: Tensor,  # (N, C)
        labels: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
    ) -> tuple[Tensor, ...]:
        rows = Rows(labels, row_temperature, temperature, softcap)
        running = logits.new_zeros((4, len(logits)), dtype=torch.float64)
        running[0].fill_(-torch.inf)
        ctx.epilogue = SlicedEpilogue(epilogue)
        ctx.epilogue.merge(logits, 0, rows, running, weighted=True)
        *statistics, state = finish(part.merge(running, rows), rows, statistics_dtype(logits.dtype))
        ctx.numbers = temperature, softcap
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, row_temperature, state)
        return tuple(statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_stats: the fused kernel has no second derivative; use impl='reference' where a gradient of the "
                "gradient is needed"
            )
        logits, labels, row_temperature, state = ctx.saved_tensors
        rows, upstream = Rows(labels, row_temperature, *ctx.numbers), Upstream(*grads)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.epilogue.differentiate(logits, 0, rows, state, upstream, gradient, row_numbers=None)
        # Of whatever logits: on the CPU the epilogue takes it that such rows were left out.
        gradient.masked_fill_(idle_rows(labels, IGNORED, upstream), 0.0)
        return None, None, gradient, None, None, None, None


# How a rank's columns are worked on, of their number and the label that is ignored.
_EPILOGUES: dict[str, Implementation] = {
    "cpu": Implementation(run=lambda *given: CpuEpilogue(), unavailable=cpu_kernel_unavailable),
    "triton": Implementation(run=TritonEpilogue, unavailable=triton_unavailable),
}


@torch._disable_dynamo  # ranks talk to each other outside of graphs
def token_stats_over_group(
    group: Any,
    check: Callable[[], None],
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, ...]:
    """Statistics [...] of logits [..., C], a rank's columns."""
    op = "token_stats"

    def check_all() -> None:
        check()
        select(op, _EPILOGUES, impl, logits)

    def facts() -> dict[str, int]:
        return {**describe(logits, labels, temperature, softcap, ignore_index), "depth": 0}

    part = agree(op, group, logits.device, logits.shape[-1], check_all, facts)
    check_rows(labels, temperature, part.vocab, ignore_index)
    number, row_temperature = split_temperature(temperature, labels.shape, logits.dtype)
    statistics = _TokenStatsParallel.apply(
        select(op, _EPILOGUES, impl, logits).run(part.columns, IGNORED),
        part,
        logits.reshape(-1, part.columns),
        part.localise(labels.reshape(-1).long(), ignore_index),
        row_temperature,
        number,
        softcap or 0.0,
    )
    return tuple(statistic.view(labels.shape) for statistic in statistics)
