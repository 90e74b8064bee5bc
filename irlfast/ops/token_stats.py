"""Per-token statistics of logits: log-prob of the label, entropy and log-sum-exp.

With scaled logits z_v = softcap(l_v) / T, softcap(l) = c tanh(l / c) where a cap c is given:

    lse = log sum_v exp z_v,    logprob = z_y - lse,    H = lse - sum_v p_v z_v,    p_v = exp(z_v - lse)

and, with upstream gradients g (logprob), h (entropy) and u (lse), one expression for the whole gradient:

    dz_v = p_v (u - g + h (lse - H) - h z_v) + g [v = y]

followed by the chain rule through 1 / T and the softcap (factor 1 - tanh^2). One pass over the vocabulary each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from irlfast.ops._cuda import cuda_unavailable, on_gpu
from irlfast.ops._dispatch import (
    LIBRARY,
    Implementation,
    cpu_kernel_unavailable,
    runs_undispatched,
    select,
    statistics_dtype,
)
from irlfast.ops._token_stats_checks import check_arguments, check_inplace, check_labels, check_one_label
from irlfast.ops._token_stats_cpu import (
    backward_cpu,
    backward_over_logits,
    check_row_temperature,
    raise_label,
    statistics_cpu,
)
from irlfast.ops._token_stats_cuda import (
    backward_cuda,
    backward_over_logits_cuda,
    statistics_cuda,
)
from irlfast.ops._token_stats_op import as_op
from irlfast.ops._token_stats_parallel import token_stats_over_group
from irlfast.ops._token_stats_triton import (
    backward_over_logits_triton,
    backward_triton,
    statistics_triton,
)
from irlfast.ops._triton import triton_unavailable


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, in nats, shaped as the labels; differentiable together.

    float32, or float64 where the logits are. Ignored rows hold 0 and pass no gradient.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


def token_stats_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """The specification of `token_stats`, in plain torch; in float64 for float64 logits.

    Labels may be [...] or [..., K] for logits [..., V]; entropy and lse are [...] either way.
    """
    vocab = logits.shape[-1]
    several = labels.ndim == logits.ndim
    index = (labels if several else labels.unsqueeze(-1)).long()
    ignored = index == ignore_index
    outside = ~ignored & ((index < 0) | (index >= vocab))
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise_label(labels, int(outside.flatten().nonzero()[0]), vocab, ignore_index)
    ignored_row = ignored.all(dim=-1)

    z = logits.to(statistics_dtype(logits.dtype))
    z = z.masked_fill(ignored_row.unsqueeze(-1), 0.0)  # so that not even a NaN there reaches the gradient
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)

    log_p = z.log_softmax(dim=-1)
    # p log p is 0 where p is: 0 * -inf must reach neither the sum nor its gradient.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)
    lse = z.logsumexp(dim=-1)
    lse = lse.masked_fill(lse.isinf(), math.nan)  # a row without a finite maximum defines no distribution
    logprob = log_p.gather(-1, index.masked_fill(ignored | outside, 0)).masked_fill(ignored, 0.0)
    logprob = logprob.masked_fill(outside, math.nan)
    outside_row = outside.any(dim=-1)
    entropy, lse = (x.masked_fill(ignored_row, 0.0).masked_fill(outside_row, math.nan) for x in (entropy, lse))
    return TokenStats(logprob if several else logprob.squeeze(-1), entropy, lse)


class _Kernels(NamedTuple):
    """The fused passes on one kind of device."""

    statistics: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]
    backward: Callable[..., Tensor]
    backward_over_logits: Callable[..., None]


_CPU = _Kernels(statistics_cpu, backward_cpu, backward_over_logits)
_CUDA = _Kernels(statistics_cuda, backward_cuda, backward_over_logits_cuda)
_TRITON = _Kernels(statistics_triton, backward_triton, backward_over_logits_triton)


def _kernels_of(logits: Tensor) -> _Kernels:
    """Those of the registered ops."""
    if not logits.is_cuda:
        return _CPU
    return _CUDA if cuda_unavailable(logits) is None else _TRITON


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor, None, None, None, None, None, None, None]:
    logits, labels, row_temperature, state = ctx.saved_tensors
    arguments = (labels, row_temperature, *ctx.numbers, state, grad_logprob, grad_entropy, grad_lse)
    # With create_graph the registered op is called, whose own derivative says that there is none.
    direct = runs_undispatched(logits) and not torch.is_grad_enabled()
    if ctx.inplace_backward:
        gradient = logits.detach()
        over_logits = ctx.kernels.backward_over_logits if direct else torch.ops.irlfast.token_stats_backward_
        over_logits(gradient, *arguments)
        # The kernel wrote behind autograd's back: whoever saved these logits must hear of it and not use them.
        torch.autograd.graph.increment_version(gradient)
    else:
        gradient = (ctx.kernels.backward if direct else torch.ops.irlfast.token_stats_backward)(logits, *arguments)
    return gradient, None, None, None, None, None, None, None


def _save_for_backward(ctx: Any, kernels: _Kernels, inputs: tuple[Any, ...], state: Tensor | None) -> None:
    ctx.kernels = kernels
    logits, labels, row_temperature, *numbers, _, ctx.inplace_backward = inputs
    ctx.numbers = numbers  # temperature, softcap, ignore_index
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, row_temperature, state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    _save_for_backward(ctx, _kernels_of(inputs[0]), inputs, output[3])


class _TokenStats(torch.autograd.Function):
    """The registered op without the dispatcher, whose two Python calls cost more than the kernel on a small batch.

    Everything but the logits comes as one tuple: each argument that autograd looks at costs time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, others: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        kernels, *arguments = others
        *statistics, state = kernels.statistics(logits, *arguments[:-1], with_state=True)
        _save_for_backward(ctx, kernels, (logits, *arguments), state)
        return tuple(statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _backward(ctx, *grads)[0], None


# Function.apply without what it does in Python for torch.func, whose transforms never come here.
_apply_token_stats: Callable[..., tuple[Any, ...]] = super(torch.autograd.Function, _TokenStats).apply

LIBRARY.impl("token_stats", as_op(statistics_cpu), "CPU")
LIBRARY.impl("token_stats_backward", backward_cpu, "CPU")
LIBRARY.impl("token_stats_backward_", backward_over_logits, "CPU")
LIBRARY.impl("token_stats", on_gpu(as_op(statistics_cuda), as_op(statistics_triton)), "CUDA")
LIBRARY.impl("token_stats_backward", on_gpu(backward_cuda, backward_triton), "CUDA")
LIBRARY.impl("token_stats_backward_", on_gpu(backward_over_logits_cuda, backward_over_logits_triton), "CUDA")
torch.library.register_autograd("irlfast::token_stats", _backward, setup_context=_setup_context, lib=LIBRARY)


def _run_kernels(
    kernels: _Kernels,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_distribution: bool,
    inplace_backward: bool,
) -> tuple[Any, ...]:
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature = temperature.to(logits.device, statistics_dtype(logits.dtype))
        row_temperature = row_temperature.expand(logits.shape[:-1]).contiguous()
        temperature = 1.0
    if labels.dtype != torch.int64:
        labels = labels.long()
    softcap = softcap or 0.0
    if type(labels) is not Tensor or not runs_undispatched(logits):
        return torch.ops.irlfast.token_stats(
            logits, labels, row_temperature, temperature, softcap, ignore_index, with_distribution, inplace_backward
        )[:3]
    logits = unwrap_if_dead(logits)  # one that outlived its torch.func transform has no address
    if logits.requires_grad and torch.is_grad_enabled():
        return _apply_token_stats(
            logits,
            (kernels, labels, row_temperature, temperature, softcap, ignore_index, with_distribution, inplace_backward),
        )
    return kernels.statistics(
        logits, labels, row_temperature, temperature, softcap, ignore_index, with_distribution, with_state=False
    )[:3]


def _run_reference(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_distribution: bool,
    inplace_backward: bool,
) -> tuple[Any, ...]:
    if inplace_backward:
        raise RuntimeError("token_stats: inplace_backward needs a fused kernel, and the reference is selected")
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(logits.shape[:-1])
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            check_row_temperature(temperature)
    return token_stats_reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run_kernels, _CPU), unavailable=cpu_kernel_unavailable),
    "cuda": Implementation(run=partial(_run_kernels, _CUDA), unavailable=cuda_unavailable),
    "triton": Implementation(run=partial(_run_kernels, _TRITON), unavailable=triton_unavailable),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    inplace_backward: bool = False,
    group: Any = None,
) -> TokenStats:
    """Log-prob of each label, entropy and log-sum-exp of each distribution, in one pass over the vocabulary.

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16. The last dimension should be adjacent and the others
            reachable by two strides (a slice such as logits[:, :-1] is); anything else is copied first.
        labels: [...], integers in [0, V), or `ignore_index`.
        temperature: a positive number, or a tensor that broadcasts to [...] with one value per row. Not differentiable.
        softcap: c > 0 replaces each logit l by c tanh(l / c) before the temperature (Gemma 2, arXiv 2408.00118). A
            logit of -inf becomes -c.
        ignore_index: rows with this label give 0 and no gradient, whatever their logits.
        impl: "auto", "reference", "cpu", "cuda" or "triton".
        inplace_backward: write the logits' gradient over the logits, which saves a tensor of their size. The caller
            owns the logits and does not read them after backward; anything else in the graph that saved them raises
            when its backward runs after this one. Backward runs once.
        group: a torch.distributed process group over whose ranks the vocabulary is split (docs/parallel.md): logits are
            then this rank's columns, adjacent, in the group's rank order, as many as each rank has. Labels are of the
            whole vocabulary, and the same on every rank.

    Returns:
        TokenStats(logprob, entropy, lse), each [...], differentiable together with respect to the logits, once. A
        token of probability 0 (logit -inf) adds 0 to the entropy and to the gradient. A row without a finite maximum
        gives NaN, in that row alone. The numbers of a row depend neither on the other rows nor on the thread count. A
        row whose upstream gradients are all 0 gets a gradient of exactly 0, even where its statistics are NaN.

    Raises:
        IndexError: a label is outside [0, V) and not `ignore_index` (on the CPU; on a GPU that row is NaN).
        TypeError: dtypes other than the above.
        ValueError: shapes, temperature or softcap; `inplace_backward` on a leaf, on logits that overlap themselves or
            with a group; ranks that were given other rows or options, on every rank.
        RuntimeError: an `impl` that is not available here; `inplace_backward` without a fused kernel.
    """
    if group is not None:

        def check() -> None:
            check_one_label("token_stats", logits, labels)
            check_arguments("token_stats", logits, labels, temperature, softcap)
            if inplace_backward:
                raise ValueError("token_stats: inplace_backward with a group, for which there is none; leave it out")

        statistics = token_stats_over_group(
            group,
            check,
            logits,
            labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            impl=impl,
        )
        return TokenStats(*statistics)
    check_one_label("token_stats", logits, labels)
    return TokenStats(
        *_run("token_stats", logits, labels, temperature, softcap, ignore_index, impl, True, inplace_backward)
    )


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probs of the labels alone: a drop-in for a selective log-softmax.

    Args:
        logits: [..., V].
        labels: [...], or [..., K] for K labels a row (repeats allowed).

    Everything else is as in `token_stats`.

    Returns:
        Log-probs in nats, shaped as the labels, float32 (float64 for float64 logits).
    """
    check_labels("token_logprobs", logits, labels)
    logprob: Tensor = _run(
        "token_logprobs", logits, labels, temperature, softcap, ignore_index, impl, False, inplace_backward
    )[0]
    return logprob


def _run(
    op: str,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    impl: str,
    with_distribution: bool,
    inplace_backward: bool,
) -> tuple[Any, ...]:
    check_arguments(op, logits, labels, temperature, softcap)
    if inplace_backward:
        check_inplace(op, logits)
    run = select(op, IMPLEMENTATIONS, impl, logits).run
    outputs: tuple[Any, ...] = run(
        logits, labels, temperature, softcap, ignore_index, with_distribution, inplace_backward
    )
    return outputs
