"""A loss that is a sum over tokens, straight from hidden states and the output head, in one pass.

    L = sum_n f_n(logprob_n, entropy_n, lse_n)

Where each f_n is known, a block of rows goes logits -> statistics -> df -> gradient of the logits -> dX, dW before the
next block begins: three N x V x D products in all (two with a frozen head), against four where backward has to make the
logits again, and no more than a block of logits in memory. Policy-gradient losses are of this kind once advantages, old
and reference log-probs and the denominator are known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from irlfast.ops._dispatch import Implementation, cpu_kernel_unavailable, not_in_this_release, select, statistics_dtype
from irlfast.ops._linear import Epilogue, Gradients, Head, Rows, Upstream, finish, pull, sweep
from irlfast.ops._linear_cpu import CpuEpilogue, check_labels
from irlfast.ops._linear_inputs import autocast, check_linear, expand_temperature, split_temperature
from irlfast.ops._linear_modes import labelled_rows
from irlfast.ops._linear_plan import Sizes, plan_backward, plan_forward, whole_pieces
from irlfast.ops._linear_triton import TritonEpilogue
from irlfast.ops._scaling import check_scaling
from irlfast.ops._token_stats_cpu import check_row_temperature
from irlfast.ops._triton import triton_unavailable
from irlfast.ops.gather_head import gather_head, is_sharded
from irlfast.ops.linear_token_stats import linear_token_stats_reference
from irlfast.ops.token_stats import TokenStats

# Of the statistics [n] of some rows, and those rows' numbers [n], int64: the sum of their terms, 0-d.
TokenLoss = Callable[[TokenStats, Tensor], Tensor]


def linear_token_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The specification of `linear_token_loss`: the loss of all rows at once, from whole logits."""
    stats = linear_token_stats_reference(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    numbers = (labels.reshape(-1) != ignore_index).nonzero().squeeze(1)
    return loss(TokenStats(*(statistic.reshape(-1)[numbers] for statistic in stats)), numbers)


class _LinearTokenLoss(torch.autograd.Function):
    """Gradients are made with the loss; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        epilogue: Epilogue,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        ignore_index: int,
        loss: TokenLoss,
        block: int,
        chunk: int,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        head = Head(weight=weight, bias=bias)
        dtype = statistics_dtype(hidden.dtype)
        numbers = labelled_rows(rows.labels, ignore_index)
        if numbers is None:
            numbers = torch.arange(len(hidden), device=hidden.device)
        of_hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
        # Blocks add up in the statistics' type.
        several = len(numbers) > block
        of_weight = weight.new_empty(weight.shape, dtype=dtype if several else weight.dtype) if needs[1] else None
        of_bias = weight.new_empty(weight.shape[:1], dtype=dtype) if needs[2] else None
        memory = hidden.new_empty(min(block, len(numbers)) * weight.shape[0], dtype=dtype)
        total = hidden.new_zeros((), dtype=torch.float64)
        added = False
        for begin in range(0, len(numbers), block):
            part = numbers[begin : begin + block]
            x, part_rows = hidden[part], rows.take(part)
            plan = plan_forward(Sizes.of(x, head.vocab, len(x)), "keep", chunk)
            running = sweep(x, head, part_rows, epilogue, plan, weighted=True, kept=memory)
            *statistics, state = finish(running, part_rows, dtype)
            value, upstream = _differentiate(loss, TokenStats(*statistics), part)
            total += value
            if not any(needs):
                continue
            count = len(part)
            active = upstream.nonzero_rows()
            if active is not None:
                if not len(active):
                    continue
                x, part, part_rows = x[active], part[active], part_rows.take(active)
                state, upstream = state[:, active], upstream.take(active)
            gradients = Gradients(
                None if of_hidden is None else hidden.new_empty(x.shape, dtype=dtype), of_weight, of_bias
            )
            plan = plan_backward(Sizes.of(x, head.vocab, len(x)), "keep", needs, chunk, adds=several)
            pull(
                x,
                head,
                part_rows,
                epilogue,
                plan,
                state,
                upstream,
                gradients,
                kept=memory,
                kept_rows=count,
                row_numbers=active,
                add=added,
            )
            added = True
            if of_hidden is not None and gradients.hidden is not None:
                of_hidden.index_copy_(0, part, gradients.hidden.to(of_hidden.dtype))
        if not added:
            for gradient in (of_weight, of_bias):
                if gradient is not None:
                    gradient.zero_()
        ctx.gradients = (of_hidden, of_weight, of_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: backward ran before, and its gradients, made with the loss, were handed out; "
                "compute the loss again, or use linear_token_stats for a graph that is kept"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_token_loss has no second derivative; use impl='reference' where a gradient of the gradient is "
                "needed"
            )
        gradients = [
            None if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (None, *gradients, *[None] * 6)


def _differentiate(loss: TokenLoss, stats: TokenStats, numbers: Tensor) -> tuple[Tensor, Upstream]:
    """The loss of some rows, and its gradient with respect to their statistics."""
    with torch.enable_grad():
        leaves = TokenStats(*(statistic.requires_grad_() for statistic in stats))
        value = loss(leaves, numbers)
        if not isinstance(value, Tensor) or value.dim() != 0:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"linear_token_loss: loss gave {given}, expected a 0-d tensor, the sum of the terms of {len(numbers)} "
                "rows"
            )
        gradients = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else ()
    if all(gradient is None for gradient in gradients):
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return value.detach(), Upstream(*gradients)


def _run_in_blocks(
    epilogue_for: Callable[[int, int], Epilogue],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: TokenLoss,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    memory_budget: int,
    chunk: int | None,
) -> Tensor:
    number, row_temperature = split_temperature(temperature, labels.shape, hidden.dtype)
    flat = labels.reshape(-1).long().contiguous()
    epilogue = epilogue_for(weight.shape[0], ignore_index)
    if isinstance(epilogue, CpuEpilogue):
        check_labels(labels, weight.shape[0], ignore_index)
        if row_temperature is not None:
            check_row_temperature(row_temperature)
    chunk = 0 if chunk is None else whole_pieces(chunk)
    block = max(1, memory_budget // (weight.shape[0] * statistics_dtype(hidden.dtype).itemsize))
    sources = (hidden, weight, bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in sources)
    rows = Rows(flat, row_temperature, number, softcap or 0.0)
    result: Tensor = _LinearTokenLoss.apply(
        epilogue, hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, ignore_index, loss, block, chunk, needs
    )
    return result


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: TokenLoss,
    *,
    temperature: float | Tensor,
    memory_budget: int,
    chunk: int | None,
    **options: Any,
) -> Tensor:
    """Whole logits: memory_budget and chunk have nothing to decide."""
    temperature = expand_temperature(temperature, labels.shape)
    return linear_token_loss_reference(hidden, weight, labels, loss, temperature=temperature, **options)


def _cpu_epilogue(vocab: int, ignore_index: int) -> Epilogue:
    return CpuEpilogue()


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run_in_blocks, _cpu_epilogue), unavailable=cpu_kernel_unavailable),
    "cuda": not_in_this_release("CUDA"),
    "triton": Implementation(run=partial(_run_in_blocks, TritonEpilogue), unavailable=triton_unavailable),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


# The given loss is called block by block, outside graphs. torch.compiler.disable would import the compiler, seconds of
# it, together with this module; this does so at the first call, as torch.optim does.
@torch._disable_dynamo
def linear_token_loss(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    loss: TokenLoss,
    *,
    bias: Tensor | None = None,  # (V)
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    memory_budget: int = 256 << 20,
    chunk: int | None = None,
) -> Tensor:  # 0-d
    """Sum of known token terms, with the gradient of hidden states and head made in the same pass.

    A policy gradient over the whole batch's `count` tokens, for instance:

        linear_token_loss(hidden, weight, labels, lambda stats, rows: -(advantages[rows] * stats.logprob).sum() / count)

    Args:
        loss: given TokenStats of some rows, each [n], and their numbers [n] (int64, places among the labels as
            flattened), the sum of their terms as a 0-d tensor. It is called block by block, and each block's value may
            depend on its own rows alone: no mean over the rows it is given, as those are not all. Gradients flow
            through the statistics alone, not to other tensors it uses. Rows whose label is ignored are never given.
        memory_budget: bytes of logits, 4 (float64: 8) for each row and token, that a block of rows may have. A budget
            for all rows at once saves adding up the weight's gradient. A block has at least one row.

    hidden, weight, labels, bias, temperature, softcap, ignore_index, impl and chunk are as in `linear_token_stats`; a
    weight that is a DTensor is gathered, as `gather_head` does.

    On a GPU the host waits for the number of labelled rows, and in each block for that of the rows with a gradient.

    Returns:
        0-d float32 (float64 for float64 input), summed over blocks in float64. Differentiable with respect to hidden,
        weight and bias, once: the gradients, made in forward, are scaled in place and handed out.

    Raises:
        IndexError, TypeError, ValueError: as `linear_token_stats`; ValueError also where `loss` gives no 0-d tensor.
        RuntimeError: an `impl` that is not available; a second backward, or a second derivative.
    """
    op = "linear_token_loss"
    if is_sharded(weight):
        weight = gather_head(weight, dtype=hidden.dtype)
        bias = None if bias is None else gather_head(bias, dtype=hidden.dtype)
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_linear(op, hidden, weight, labels, bias, memory_budget, chunk)
    check_scaling(op, temperature, softcap, labels.shape)
    result: Tensor = select(op, IMPLEMENTATIONS, impl, hidden).run(
        hidden,
        weight,
        labels,
        loss,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        chunk=chunk,
    )
    return result
