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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    cpu_kernel_unavailable,
    not_in_this_release,
    row_layout,
    rows_overlap,
    runs_undispatched,
    select,
    statistics_dtype,
)
from irlfast.ops._token_stats_cpu import Statistics, backward_cpu, check_row_temperature, forward_cpu, raise_label


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


# The op: labels are int64, [...] or [..., K]; row_temperature, where given, replaces temperature, one a row, contiguous
# in the statistics' type; softcap 0 means none. Besides logprob, entropy ([0] unless asked for) and lse it returns
# state [3, rows], what the gradient needs of each row.
LIBRARY.define(
    "token_stats(Tensor logits, Tensor labels, Tensor? row_temperature, float temperature, float softcap, "
    "int ignore_index, bool with_entropy, bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "token_stats_backward(Tensor logits, Tensor labels, Tensor? row_temperature, float temperature, float softcap, "
    "int ignore_index, Tensor state, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse) -> Tensor"
)
LIBRARY.define(
    "token_stats_backward_(Tensor(a!) logits, Tensor labels, Tensor? row_temperature, float temperature, "
    "float softcap, int ignore_index, Tensor state, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse)"
    " -> ()"
)


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
) -> Statistics:
    dtype = statistics_dtype(logits.dtype)
    rows_shape = logits.shape[:-1]
    return (
        labels.new_empty(labels.shape, dtype=dtype),
        logits.new_empty(rows_shape if with_entropy else (0,), dtype=dtype),
        logits.new_empty(rows_shape, dtype=dtype),
        logits.new_empty((3, math.prod(rows_shape)), dtype=dtype),
    )


def _backward_fake(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_over_logits(logits: Tensor, *arguments: Any) -> None:
    backward_cpu(logits, *arguments, gradient=logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    logits, labels, row_temperature, ctx.temperature, ctx.softcap, ctx.ignore_index, _, ctx.inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(logits, labels, row_temperature, output[3])


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor, None, None, None, None, None, None, None]:
    logits, labels, row_temperature, state = ctx.saved_tensors
    arguments = (
        labels,
        row_temperature,
        ctx.temperature,
        ctx.softcap,
        ctx.ignore_index,
        state,
        grad_logprob,
        grad_entropy,
        grad_lse,
    )
    # With create_graph the registered op is called, whose own derivative says that there is none.
    direct = runs_undispatched(logits) and not torch.is_grad_enabled()
    if ctx.inplace_backward:
        gradient = logits.detach()
        (_backward_over_logits if direct else torch.ops.irlfast.token_stats_backward_)(gradient, *arguments)
        # The native code wrote behind autograd's back: whoever saved these logits must hear of it and not use them.
        torch.autograd.graph.increment_version(gradient)
    else:
        gradient = (backward_cpu if direct else torch.ops.irlfast.token_stats_backward)(logits, *arguments)
    return gradient, None, None, None, None, None, None, None


class _TokenStats(torch.autograd.Function):
    """The registered op without the dispatcher, whose two Python calls cost more than the kernel on a small batch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Statistics:
        output = forward_cpu(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "token_stats: the fused kernel has no second derivative; use impl='reference' where a gradient of the "
        "gradient is needed"
    )


LIBRARY.impl("token_stats", forward_cpu, "CPU")
LIBRARY.impl("token_stats_backward", backward_cpu, "CPU")
LIBRARY.impl("token_stats_backward_", _backward_over_logits, "CPU")
torch.library.register_fake("irlfast::token_stats", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_stats_backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_stats_backward_", lambda *args: None, lib=LIBRARY)
torch.library.register_autograd("irlfast::token_stats", _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd("irlfast::token_stats_backward", _no_second_derivative, lib=LIBRARY)


def _run_native(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
) -> TokenStats:
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature = temperature.to(statistics_dtype(logits.dtype)).expand(logits.shape[:-1]).contiguous()
        temperature = 1.0
    if labels.dtype != torch.int64:
        labels = labels.long()
    run: Callable[..., Statistics] = torch.ops.irlfast.token_stats
    if runs_undispatched(logits):
        run = _TokenStats.apply if logits.requires_grad and torch.is_grad_enabled() else forward_cpu
    logprob, entropy, lse, _ = run(
        logits, labels, row_temperature, temperature, softcap or 0.0, ignore_index, with_entropy, inplace_backward
    )
    return TokenStats(logprob, entropy, lse)


def _run_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
    inplace_backward: bool,
) -> TokenStats:
    if inplace_backward:
        raise RuntimeError("token_stats: inplace_backward needs a fused kernel, and the reference is selected")
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(logits.shape[:-1])
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            check_row_temperature(temperature)
    return token_stats_reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)


IMPLEMENTATIONS = {
    "cpu": Implementation(run=_run_native, unavailable=cpu_kernel_unavailable),
    "cuda": not_in_this_release("CUDA"),
    "triton": not_in_this_release("Triton"),
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

    Returns:
        TokenStats(logprob, entropy, lse), each [...], differentiable together with respect to the logits, once. A
        token of probability 0 (logit -inf) adds 0 to the entropy and to the gradient. A row without a finite maximum
        gives NaN, in that row alone. The numbers of a row depend neither on the other rows nor on the thread count. A
        row whose upstream gradients are all 0 gets a gradient of exactly 0, even where its statistics are NaN.

    Raises:
        IndexError: a label is outside [0, V) and not `ignore_index` (on the CPU; on a GPU that row is NaN).
        TypeError: dtypes other than the above.
        ValueError: shapes, temperature or softcap; `inplace_backward` on a leaf or on logits that overlap themselves.
        RuntimeError: an `impl` that is not available here; `inplace_backward` without a fused kernel.
    """
    if logits.ndim > 0 and labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_stats: labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])} for logits "
            f"{tuple(logits.shape)}; token_logprobs takes several labels a row"
        )
    result: TokenStats = _run(
        "token_stats", logits, labels, temperature, softcap, ignore_index, impl, True, inplace_backward
    )
    return result


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
    if logits.ndim > 0 and logits.shape[:-1] not in (labels.shape, labels.shape[:-1]):
        shape = ", ".join(map(str, logits.shape[:-1]))
        raise ValueError(
            f"token_logprobs: labels have shape {tuple(labels.shape)}, expected [{shape}] or [{shape}, K] for logits "
            f"{tuple(logits.shape)}"
        )
    return _run(
        "token_logprobs", logits, labels, temperature, softcap, ignore_index, impl, False, inplace_backward
    ).logprob


def _run(
    op: str,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    impl: str,
    with_entropy: bool,
    inplace_backward: bool,
) -> TokenStats:
    _check(op, logits, labels, temperature, softcap)
    if inplace_backward:
        _check_inplace(op, logits)
    return select(op, IMPLEMENTATIONS, impl, logits).run(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        with_entropy=with_entropy,
        inplace_backward=inplace_backward,
    )


def _check(op: str, logits: Tensor, labels: Tensor, temperature: float | Tensor, softcap: float | None) -> None:
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: logits are {logits.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"{op}: labels are {labels.dtype}, expected integers; convert them with labels.long()")
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels are on {labels.device}, logits on {logits.device}; move one to the other")
    if logits.ndim == 0:
        raise ValueError(f"{op}: logits are a single number, expected at least one dimension, the vocabulary")
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits of shape {tuple(logits.shape)} have an empty vocabulary")
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(
                f"{op}: temperature requires grad, and there is no gradient with respect to it; pass "
                "temperature.detach(), or divide the logits by it beforehand"
            )
        try:
            broadcast = torch.broadcast_shapes(temperature.shape, logits.shape[:-1])
        except RuntimeError:
            broadcast = None
        if broadcast != logits.shape[:-1]:
            raise ValueError(
                f"{op}: temperature of shape {tuple(temperature.shape)} does not broadcast to the rows "
                f"{tuple(logits.shape[:-1])}; give one value per row"
            )
    elif not (temperature > 0 and temperature < math.inf):
        raise ValueError(f"{op}: temperature = {temperature} is not a positive finite number")
    if softcap is not None and not (softcap > 0 and softcap < math.inf):
        raise ValueError(f"{op}: softcap = {softcap} is not a positive finite number; None switches it off")


_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_inplace(op: str, logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: inplace_backward inside torch.compile: the compiler plans its own buffers, leave it out"
        )
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            f"{op}: inplace_backward on a leaf: its .grad would be its own storage; pass logits a model computed, or "
            "leave inplace_backward out"
        )
    layout = row_layout(logits)
    if layout is None or rows_overlap(layout, logits.shape[-1]):
        raise ValueError(
            f"{op}: inplace_backward on logits of shape {tuple(logits.shape)} and strides {logits.stride()}, whose "
            "rows are scattered or overlap; pass logits.contiguous(), or leave inplace_backward out"
        )
