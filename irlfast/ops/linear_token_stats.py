"""Per-token statistics straight from hidden states and the output head: the logits never exist whole.

With logits l = X W^T + b [N, V] and z, logprob, entropy and lse as in `token_stats`, and dl their gradient:

    dX = dl W,      dW = dl^T X,      db = sum_n dl_n

The vocabulary is walked through in chunks: a product makes the logits of some columns in a reused buffer, and their
online softmax is added to that of the columns before. In units of one N x V x D product, `mode` says what backward has:

    recompute   the logits once more, chunk by chunk: 1 forward, 3 backward (2 with a frozen head), nothing kept
    keep        the logits of forward, N x V of them: 1 forward, 2 backward (1 with a frozen head)
    frozen      for a head that is not trained, E_n = sum_{v != y} p_v W_v, summed beside the statistics as an online
                softmax: 2 forward, and then dX = (g (1 - p_y) + u p_y) W_y - (g - u) E, a scaling of rows. A gradient
                of the entropy, where there is one, costs 2 more
    fused       as recompute, but that forward multiplies within the kernel that makes the statistics: its logits are
                never in memory. Triton alone has it

On the CPU rows with an ignored label take part in no product, rows that receive no gradient in no product of backward.
On a GPU, where the host would wait to count them, they do, with hidden states of 0: nothing of theirs reaches a result.
Where the host knows the number of labels, `max_rows` leaves the ignored rows out there too.
("fused" looks at the labels of 32 to 128 rows at once, and multiplies none of them if all are ignored.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from irlfast.ops._compaction import over_labelled_rows
from irlfast.ops._dispatch import (
    LIBRARY,
    Implementation,
    Kernels,
    cpu_kernel_unavailable,
    not_in_this_release,
    runs_undispatched,
    select,
    statistics_dtype,
)
from irlfast.ops._linear_cpu import CpuEpilogue, check_labels
from irlfast.ops._linear_inputs import autocast, check_linear, expand_temperature, split_temperature
from irlfast.ops._linear_modes import Outputs, backward_chunked, forward_chunked
from irlfast.ops._linear_parallel import linear_token_stats_over_group
from irlfast.ops._linear_plan import whole_pieces
from irlfast.ops._linear_triton import TritonEpilogue, backward_triton, forward_triton
from irlfast.ops._scaling import check_scaling
from irlfast.ops._token_stats_cpu import check_row_temperature
from irlfast.ops._triton import triton_unavailable
from irlfast.ops._vocabulary import Slice, agree, check_rows, describe, gathered, plain, take_shards
from irlfast.ops.gather_head import is_sharded
from irlfast.ops.token_stats import TokenStats, token_stats_reference

Mode = Literal["auto", "recompute", "keep", "frozen", "fused"]
MODES: tuple[str, ...] = get_args(Mode)


def linear_token_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """The specification of `linear_token_stats`: whole logits in the statistics' type, then `token_stats_reference`."""
    dtype = statistics_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # whose product would round the logits
        logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    return token_stats_reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)


# hidden [N, D], labels int64 [N]; row_temperature, where given, replaces temperature, one a row, contiguous in the
# statistics' type; softcap 0 means none. Besides logprob, entropy and lse [N] the op returns state [4, N], what the
# gradient needs of each row, and what `mode` saves: kept logits [N * V], E [N, D], or nothing [0].
LIBRARY.define(
    "linear_token_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_temperature, "
    "float temperature, float softcap, int ignore_index, str mode, int chunk) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "linear_token_stats_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_temperature, "
    "float temperature, float softcap, int ignore_index, str mode, int chunk, Tensor state, Tensor saved, "
    "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)


def _forward_cpu(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Outputs:
    row_temperature, _, _, ignore_index, *_ = rest
    check_labels(labels, weight.shape[0], ignore_index)
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    return forward_chunked(CpuEpilogue(), hidden, weight, bias, labels, *rest)


def _backward_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward_chunked(CpuEpilogue(), *arguments)


_CPU = Kernels(_forward_cpu, _backward_cpu)
_TRITON = Kernels(forward_triton, backward_triton)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    mode: str,
    chunk: int,
) -> Outputs:
    dtype = statistics_dtype(hidden.dtype)
    count, depth = hidden.shape
    saved: tuple[int, ...] = (0,)
    if mode == "keep":
        saved = (count * weight.shape[0],)
    elif mode == "frozen":
        saved = (count, depth)
    logprob, entropy, lse = (hidden.new_empty((count,), dtype=dtype) for _ in range(3))
    return logprob, entropy, lse, hidden.new_empty((4, count), dtype=dtype), hidden.new_empty(saved, dtype=dtype)


def _backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-1]
    sources = (hidden, weight, hidden if bias is None else bias)
    return tuple(  # type: ignore[return-value]
        source.new_empty(source.shape) if needed else hidden.new_empty((0,))
        for source, needed in zip(sources, needs, strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    hidden, weight, bias, labels, row_temperature, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(hidden, weight, bias, labels, row_temperature, *output[3:])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate(torch.ops.irlfast.linear_token_stats_backward, ctx, ctx.needs_input_grad[:3], grads)


def _differentiate(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, row_temperature, state, saved = ctx.saved_tensors
    needs = [bool(need) for need in needed]
    gradients = run(hidden, weight, bias, labels, row_temperature, *ctx.options, state, saved, *grads[:3], needs)
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * 7)


class _LinearTokenStats(torch.autograd.Function):
    """The registered op with the kernels given, which in Triton's interpreter are not those of the tensors' device."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *inputs: Any) -> Outputs:
        output: Outputs = kernels.forward(*inputs)
        ctx.kernels = kernels
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # With create_graph the registered op is called, whose own derivative says that there is none.
        direct = not torch.is_grad_enabled() and runs_undispatched(ctx.saved_tensors[0])
        run = ctx.kernels.backward if direct else torch.ops.irlfast.linear_token_stats_backward
        return None, *_differentiate(run, ctx, ctx.needs_input_grad[1:4], grads)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "linear_token_stats: the fused kernel has no second derivative; use impl='reference' where a gradient of the "
        "gradient is needed"
    )


LIBRARY.impl("linear_token_stats", _forward_cpu, "CPU")
LIBRARY.impl("linear_token_stats_backward", _backward_cpu, "CPU")
LIBRARY.impl("linear_token_stats", forward_triton, "CUDA")  # AMD's GPUs have the key too
LIBRARY.impl("linear_token_stats_backward", backward_triton, "CUDA")
torch.library.register_fake("irlfast::linear_token_stats", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::linear_token_stats_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("irlfast::linear_token_stats", _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd("irlfast::linear_token_stats_backward", _no_second_derivative, lib=LIBRARY)


def _run_kernels(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    memory_budget: int,
    chunk: int | None,
) -> TokenStats:
    shape = labels.shape
    # Under compile the op itself checks, which sees labels without their shape.
    if kernels is _CPU and not torch.compiler.is_compiling():
        check_labels(labels, weight.shape[0], ignore_index)
    temperature, row_temperature = split_temperature(temperature, shape, hidden.dtype)
    chunk = 0 if chunk is None else whole_pieces(chunk)  # the plan's choice
    mode = resolve_mode(mode, hidden, weight, bias, labels.numel(), memory_budget)
    run: Callable[..., Outputs] = torch.ops.irlfast.linear_token_stats
    if kernels is _TRITON and runs_undispatched(hidden) and runs_undispatched(weight):
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
        run = partial(_LinearTokenStats.apply, kernels) if recorded else kernels.forward
    logprob, entropy, lse, _, _ = run(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1).long(),
        row_temperature,
        temperature,
        softcap or 0.0,
        ignore_index,
        mode,
        chunk,
    )
    return TokenStats(logprob.view(shape), entropy.view(shape), lse.view(shape))


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    memory_budget: int,
    chunk: int | None,
) -> TokenStats:
    """Whole logits: mode, memory_budget and chunk have nothing to decide."""
    temperature = expand_temperature(temperature, labels.shape)
    return linear_token_stats_reference(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )


def _reference_over_group(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: Slice, *, bias: Tensor | None, **options: Any
) -> TokenStats:
    """The whole head on every rank."""
    for name in ("mode", "chunk"):
        options.pop(name)
    bias = None if bias is None else gathered(bias, part)
    options["temperature"] = expand_temperature(options["temperature"], labels.shape)
    return linear_token_stats_reference(hidden, gathered(weight, part), labels, bias=bias, **options)


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run_kernels, _CPU), unavailable=cpu_kernel_unavailable),
    "cuda": not_in_this_release("CUDA"),
    "triton": Implementation(run=partial(_run_kernels, _TRITON), unavailable=triton_unavailable),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


# The same over a vocabulary that is split; how a rank's columns are worked on.
OVER_GROUP = {
    "cpu": replace(IMPLEMENTATIONS["cpu"], run=partial(linear_token_stats_over_group, lambda *given: CpuEpilogue())),
    "triton": replace(IMPLEMENTATIONS["triton"], run=partial(linear_token_stats_over_group, TritonEpilogue)),
    "reference": replace(IMPLEMENTATIONS["reference"], run=_reference_over_group),
}


def resolve_mode(mode: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, count: int, memory_budget: int) -> str:
    """The mode that "auto" stands for; ValueError where the one asked for cannot give a gradient that is needed."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if mode == "auto":
        if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
            return "recompute"
        if not trained:
            return "frozen"
        nbytes = count * weight.shape[0] * statistics_dtype(hidden.dtype).itemsize
        return "keep" if nbytes <= memory_budget else "recompute"
    if mode == "frozen" and trained:
        raise ValueError(
            "linear_token_stats: mode='frozen' with a weight or bias that requires grad, for which it has no gradient; "
            "use mode='auto', or weight.detach() for a head that is not trained"
        )
    return mode


def _impl_of_fused(impl: str, hidden: Tensor) -> str:
    """The implementation that has the mode; ValueError for another by name, RuntimeError where it cannot run."""
    if impl not in ("auto", "triton") and impl in IMPLEMENTATIONS:
        raise ValueError(
            f"linear_token_stats: mode='fused' with impl={impl!r}, which has no such mode; use impl='triton', or "
            "another mode"
        )
    reason = IMPLEMENTATIONS["triton"].unavailable(hidden) if impl == "auto" else None
    if reason is not None:
        raise RuntimeError(
            f"linear_token_stats: mode='fused' takes impl='triton', which is not available: {reason}; use mode='auto'"
        )
    return "triton" if impl == "auto" else impl


@torch._disable_dynamo  # ranks talk to each other outside of graphs
def _over_group(
    group: Any,
    check: Callable[[], None],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    impl: str,
    memory_budget: int,
    *,
    mode: str,
    **options: Any,
) -> TokenStats:
    op, bias = "linear_token_stats", options["bias"]

    def check_all() -> None:
        check()
        if mode == "fused":
            raise ValueError(f"{op}: mode='fused' takes a whole vocabulary, this one is split; use mode='auto'")
        select(op, OVER_GROUP, impl, hidden)
        resolve_mode(mode, hidden, weight, bias, labels.numel(), memory_budget)

    scaling = options["temperature"], options["softcap"], options["ignore_index"]
    part = agree(op, group, hidden.device, weight.shape[0], check_all, lambda: describe(hidden, labels, *scaling, bias))
    check_rows(labels, options["temperature"], part.vocab, options["ignore_index"])
    mode = resolve_mode(mode, hidden, weight, bias, labels.numel(), memory_budget)
    result: TokenStats = select(op, OVER_GROUP, impl, hidden).run(hidden, weight, labels, part, mode=mode, **options)
    return result


def linear_token_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V)
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    mode: Mode = "auto",
    memory_budget: int = 1 << 30,
    chunk: int | None = None,
    max_rows: int | None = None,
    group: Any = None,
) -> TokenStats:
    """Log-prob of each label, entropy and log-sum-exp from hidden states and the output head.

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16. Under autocast, hidden, weight and bias are cast as
            torch.nn.functional.linear would have them.
        weight: [V, D], the output head in the hidden states' type.
        labels: [...], integers in [0, V), or `ignore_index`.
        bias: [V].
        temperature: a positive number, or a tensor that broadcasts to [...] with one value per row. Not differentiable.
        softcap: c > 0 replaces each logit l by c tanh(l / c) before the temperature (Gemma 2, arXiv 2408.00118).
        ignore_index: rows with this label give 0, no gradient, and (on the CPU) cost no product.
        impl: "auto", "reference", "cpu", "cuda" or "triton". The reference makes the logits whole.
        mode: "recompute", "keep", "frozen" or "fused", see above; only speed and memory differ. "auto" takes "frozen"
            where neither weight nor bias is trained (if the loss has an entropy term, "keep" is as quick), otherwise
            "keep" where the logits fit the budget, otherwise "recompute". "fused" is for heads of few dimensions, and
            with impl="auto" asks for Triton.
        memory_budget: bytes that kept logits, 4 (float64: 8) for each row and token, may take under "auto".
        chunk: columns of the vocabulary worked on at a time, rounded up to a multiple of 2048; None leaves them to the
            plan (docs/performance.md): 2048, on a GPU by the sizes, its cache and 256 MiB that buffers may take. What
            is summed per row does not depend on it. On the CPU up to 16 MiB of logits are worked on at a time. "fused"
            has chunks in backward alone.
        max_rows: how many rows have a label, or more, where the caller knows it without asking the device (a data
            loader does). On a GPU so many take part in products, forward and backward, instead of all, at the cost of a
            copy of their hidden states; if there are more, those beyond are NaN (refused on the CPU, which counts).
        group: a torch.distributed process group over whose ranks the vocabulary is split (docs/parallel.md). weight
            and bias are then this rank's columns, adjacent, in the group's rank order, as many as each rank has; all
            else is the same on every rank, which gets the same statistics and hidden gradient, and its own weight's.
            A weight that is a DTensor is gathered without a group, as `gather_head` does.

    Returns:
        TokenStats(logprob, entropy, lse), each [...], float32 (float64 for float64 input), differentiable together
        with respect to hidden, weight and bias, once. Logits are not rounded to the hidden states' type; their
        gradient is, where they are bfloat16 (on a GPU float16 too) and the processor multiplies those (as it would be
        in eager). A row that receives no gradient enters no product of backward (on the CPU) and gets exactly 0, and so
        do its terms elsewhere.

    Raises:
        IndexError: a label is outside [0, V) and not `ignore_index` (on the CPU; on a GPU that row is NaN).
        TypeError: dtypes that differ or are none of the above.
        ValueError: shapes, devices, temperature, softcap, mode, memory_budget or chunk; ranks that were given other
            rows or options, on every rank.
        RuntimeError: an `impl` that is not available here, or mode="fused" where Triton is not.
    """
    op = "linear_token_stats"
    if max_rows is not None:

        def run(states: list[Tensor], labels: Tensor, temperature: float | Tensor) -> TokenStats:
            return linear_token_stats(
                states[0],
                weight,
                labels,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
                impl=impl,
                mode=mode,
                memory_budget=memory_budget,
                chunk=chunk,
                group=group,
            )

        few: TokenStats = over_labelled_rows(op, run, [hidden], labels, temperature, ignore_index, max_rows)
        return few
    hidden, weight, bias = autocast(hidden, weight, bias)
    if group is not None or is_sharded(weight) or is_sharded(hidden):
        hidden, weight, bias, group = take_shards(op, hidden, weight, bias, group)
        labels = plain(labels)

    def check() -> None:
        check_linear(op, hidden, weight, labels, bias, memory_budget, chunk)
        check_scaling(op, temperature, softcap, labels.shape)
        if mode not in MODES:
            raise ValueError(f"{op}: mode={mode!r} is unknown; expected one of {', '.join(map(repr, MODES))}")

    if group is not None:
        return _over_group(
            group,
            check,
            hidden,
            weight,
            labels,
            impl,
            memory_budget,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            mode=mode,
            chunk=chunk,
        )
    check()
    if mode == "fused":
        impl = _impl_of_fused(impl, hidden)
    result: TokenStats = select(op, IMPLEMENTATIONS, impl, hidden).run(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        mode=mode,
        memory_budget=memory_budget,
        chunk=chunk,
    )
    return result
