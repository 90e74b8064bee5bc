"""The linear ops over a vocabulary that is split over the ranks of a group: the loops of `_linear`, over their slices.

See `_vocabulary` for what the ranks exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from irlfast.ops._linear import Epilogue, Rows, Upstream
from irlfast.ops._linear_inputs import split_temperature
from irlfast.ops._linear_modes import Outputs, backward_chunked, forward_chunked
from irlfast.ops._linear_pair import Models, PairEpilogue, backward_pair, forward_pair
from irlfast.ops._linear_pair import Outputs as PairOutputs
from irlfast.ops._linear_plan import whole_pieces
from irlfast.ops._vocabulary import IGNORED, Slice, SlicedEpilogue, any_column
from irlfast.ops.token_stats import TokenStats


class SlicedPairEpilogue:
    """The same of a `PairEpilogue`."""

    def __init__(self, epilogue: PairEpilogue) -> None:
        self.epilogue = epilogue
        self.compacts = epilogue.compacts
        self.alone: Epilogue = SlicedEpilogue(epilogue.alone)
        self.differentiate = epilogue.differentiate

    def merge(self, logits: Tensor, ref_logits: Tensor, first_column: int, rows: Rows, running: Tensor) -> None:
        self.epilogue.merge(logits, ref_logits, first_column, any_column(rows), running)


class LinearTokenStatsParallel(torch.autograd.Function):
    """logprob, entropy and lse [N] of all ranks' columns; labels as `Slice.localise` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        epilogue: Epilogue,
        part: Slice,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        mode: str,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        ctx.epilogue, ctx.part, ctx.options = (
            SlicedEpilogue(epilogue),
            part,
            (temperature, softcap, IGNORED, mode, chunk),
        )
        inputs = (hidden, weight, bias, labels, row_temperature)
        outputs: Outputs = forward_chunked(
            ctx.epilogue, *inputs, temperature, softcap, IGNORED, mode, chunk, share=part
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs[3:])
        return outputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _no_second_derivative("linear_token_stats")
        needs = list(ctx.needs_input_grad[2:5])
        *inputs, state, saved = ctx.saved_tensors
        # What autograd hands on is of no type that a checker could count.
        run: Callable[..., tuple[Tensor, ...]] = backward_chunked
        gradients = run(ctx.epilogue, *inputs, *ctx.options, state, saved, *grads, needs, ctx.part)
        return _returned(gradients, needs, 6)


class LinearPolicyRefStatsParallel(torch.autograd.Function):
    """The six statistics [N] of all ranks' columns; labels as `Slice.localise` has them."""

    @staticmethod
    def forward(
        ctx: Any,
        epilogue: PairEpilogue,
        part: Slice,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        ref_hidden, ref_weight, ref_bias = ref
        rows = Rows(labels, row_temperature, temperature, softcap, ref_hidden)
        models = Models(weight, bias, ref_weight, ref_bias)
        ctx.epilogue, ctx.part, ctx.numbers = SlicedPairEpilogue(epilogue), part, (temperature, softcap, chunk)
        outputs: PairOutputs = forward_pair(ctx.epilogue, hidden, models, rows, IGNORED, chunk, share=part)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[3])
        ctx.save_for_backward(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, row_temperature, outputs[6]
        )
        return outputs[:6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _no_second_derivative("linear_policy_ref_stats")
        needs = list(ctx.needs_input_grad[2:5])
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, row_temperature, running = ctx.saved_tensors
        temperature, softcap, chunk = ctx.numbers
        logprob, entropy, lse, _, reverse_kl, forward_kl = grads
        gradients = backward_pair(
            ctx.epilogue,
            hidden,
            Models(weight, bias, ref_weight, ref_bias),
            Rows(labels, row_temperature, temperature, softcap, ref_hidden),
            IGNORED,
            chunk,
            running,
            Upstream(logprob, entropy, lse, reverse_kl, forward_kl),
            needs,
            share=ctx.part,
        )
        return _returned(gradients, needs, 6)


def _no_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: the fused kernel has no second derivative; use impl='reference' where a gradient of the gradient "
            "is needed"
        )


def _returned(gradients: tuple[Tensor, ...], needs: list[bool], others: int) -> tuple[Tensor | None, ...]:
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return (None, None, *wanted, *[None] * others)


def linear_token_stats_over_group(
    make_epilogue: Callable[[int, int], Epilogue],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: Slice,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    chunk: int | None,
) -> TokenStats:
    shape = labels.shape
    number, row_temperature = split_temperature(temperature, shape, hidden.dtype)
    statistics = LinearTokenStatsParallel.apply(
        make_epilogue(part.columns, IGNORED),
        part,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        part.localise(labels.reshape(-1).long(), ignore_index),
        row_temperature,
        number,
        softcap or 0.0,
        mode,
        0 if chunk is None else whole_pieces(chunk),
    )
    return TokenStats(*(statistic.view(shape) for statistic in statistics))


def linear_policy_ref_stats_over_group(
    make_epilogue: Callable[[int, int], PairEpilogue],
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    part: Slice,
    *,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    """The fields of PolicyRefStats."""
    shape = labels.shape
    number, row_temperature = split_temperature(temperature, shape, hidden.dtype)
    ref_rows = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    statistics = LinearPolicyRefStatsParallel.apply(
        make_epilogue(part.columns, IGNORED),
        part,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        (ref_rows, ref_weight.detach(), None if ref_bias is None else ref_bias.detach()),
        part.localise(labels.reshape(-1).long(), ignore_index),
        row_temperature,
        number,
        softcap or 0.0,
        0 if chunk is None else whole_pieces(chunk),
    )
    return tuple(statistic.view(shape) for statistic in statistics)
