"""Exact divergence of a policy's token distributions from a reference's, over the whole vocabulary.

With scaled logits z_v = softcap(l_v) / T as in `token_stats`, p = softmax(z) of the policy and q of the reference:

    reverse     KL(p || q) = sum_v p_v (log p_v - log q_v)
    forward     KL(q || p)
    js          w KL(p || M) + (1 - w) KL(q || M),    M = w p + (1 - w) q

and, with upstream gradient g, the gradients of the logits

    reverse     dz_v = g p_v (log p_v - log q_v - KL(p || q)),    dz'_v = g (q_v - p_v)
    forward     dz_v = g (p_v - q_v),    dz'_v = g q_v (log q_v - log p_v - KL(q || p))
    js          dz_v = g w p_v (log(p_v / M_v) - KL(p || M)),    dz'_v = g (1 - w) q_v (log(q_v / M_v) - KL(q || M))

of the policy and of the reference, followed by the chain rule through 1 / T and the softcap. Differences of the two
rows' logits are summed, not the rows apart. Estimates from the sampled token alone are in `kl_estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import cuda_unavailable, on_gpu
from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    cpu_kernel_unavailable,
    runs_undispatched,
    select,
    statistics_dtype,
)
from irlfast.ops._linear_inputs import expand_temperature
from irlfast.ops._scaling import check_scaling
from irlfast.ops._token_kl_cpu import STATE, backward_cpu, forward_cpu
from irlfast.ops._token_kl_cuda import backward_cuda, forward_cuda
from irlfast.ops._token_kl_triton import backward_triton, forward_triton
from irlfast.ops._token_stats_checks import check_inplace
from irlfast.ops._triton import triton_unavailable

Kind = Literal["reverse", "forward", "js"]
KINDS: tuple[str, ...] = get_args(Kind)


def token_kl_reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str = "reverse",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    js_weight: float = 0.5,
) -> Tensor:
    """The specification of `token_kl`, in plain torch; in float64 for float64 logits."""

    def log_softmax(x: Tensor) -> Tensor:
        x = x.to(statistics_dtype(x.dtype))
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        scale = temperature.to(x.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        return (x / scale).log_softmax(dim=-1)

    log_p, log_q = log_softmax(logits), log_softmax(ref_logits)
    if kind == "js":
        # Where neither has the token its share of the mixture is 0 / 0, and must not reach the gradient.
        neither = (log_p == -math.inf) & (log_q == -math.inf)
        log_p, log_q = log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)
        log_m = torch.logaddexp(log_p + math.log(js_weight), log_q + math.log1p(-js_weight))
        of_p, of_q = (
            (x.exp() * (x - log_m).masked_fill((x == -math.inf) | neither, 0.0)).masked_fill(neither, 0.0).sum(dim=-1)
            for x in (log_p, log_q)
        )
        return js_weight * of_p + (1 - js_weight) * of_q
    if kind == "forward":
        log_p, log_q = log_q, log_p
    absent, missing = log_p == -math.inf, log_q == -math.inf
    kl = (log_p.exp() * (log_p - log_q).masked_fill(absent | missing, 0.0)).sum(dim=-1)
    return kl.masked_fill((missing & ~absent).any(dim=-1), math.inf)


# The op: row_temperature, where given, replaces temperature, one a row, contiguous in the statistics' type; softcap 0
# means none; kind is a code of _native.DIVERGENCES. Besides the divergence it returns state [6, rows] float64, what the
# gradient needs of each row. Gradients that are not wanted are [0].
LIBRARY.define(
    "token_kl(Tensor logits, Tensor ref_logits, Tensor? row_temperature, float temperature, float softcap, int kind, "
    "float js_weight, bool inplace_backward) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "token_kl_backward(Tensor logits, Tensor ref_logits, Tensor? row_temperature, float temperature, float softcap, "
    "int kind, float js_weight, Tensor state, Tensor upstream, bool of_logits, bool of_ref_logits) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "token_kl_backward_(Tensor(a!) logits, Tensor ref_logits, Tensor? row_temperature, float temperature, "
    "float softcap, int kind, float js_weight, Tensor state, Tensor upstream, bool of_ref_logits) -> Tensor"
)


def _forward_fake(logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    rows_shape = logits.shape[:-1]
    kl = logits.new_empty(rows_shape, dtype=statistics_dtype(logits.dtype))
    return kl, logits.new_empty((STATE, math.prod(rows_shape)), dtype=torch.float64)


def _backward_fake(logits: Tensor, ref_logits: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    *_, of_logits, of_ref_logits = args
    return (
        logits.new_empty(logits.shape if of_logits else (0,)),
        logits.new_empty(ref_logits.shape if of_ref_logits else (0,)),
    )


def _backward_over_logits_fake(logits: Tensor, ref_logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(ref_logits.shape if args[-1] else (0,))


class _Kernels(NamedTuple):
    """The fused passes on one kind of device."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


_CPU = _Kernels(forward_cpu, backward_cpu)
_CUDA = _Kernels(forward_cuda, backward_cuda)
_TRITON = _Kernels(forward_triton, backward_triton)


def _kernels_of(logits: Tensor) -> _Kernels:
    """Those of the registered ops."""
    if not logits.is_cuda:
        return _CPU
    return _CUDA if cuda_unavailable(logits) is None else _TRITON


def _backward_over_logits(kernels: _Kernels, logits: Tensor, *arguments: Any) -> Tensor:
    return kernels.backward(logits, *arguments[:-1], True, arguments[-1], gradient=logits)[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save_for_backward(ctx, _kernels_of(inputs[0]), inputs, output)


def _save_for_backward(ctx: Any, kernels: _Kernels, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.kernels = kernels
    logits, ref_logits, row_temperature, *ctx.options, ctx.inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, ref_logits, row_temperature, output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    logits, ref_logits, row_temperature, state = ctx.saved_tensors
    of_logits, of_ref_logits = ctx.needs_input_grad[:2]
    arguments = (ref_logits, row_temperature, *ctx.options, state, upstream)
    # With create_graph the registered op is called, whose own derivative says that there is none.
    direct = runs_undispatched(logits) and runs_undispatched(ref_logits) and not torch.is_grad_enabled()
    over_logits: Callable[..., Tensor] = torch.ops.irlfast.token_kl_backward_
    fresh: Callable[..., tuple[Tensor, Tensor]] = torch.ops.irlfast.token_kl_backward
    if direct:
        over_logits, fresh = partial(_backward_over_logits, ctx.kernels), ctx.kernels.backward
    if ctx.inplace_backward and of_logits:
        gradient = logits.detach()
        ref_gradient = over_logits(gradient, *arguments, of_ref_logits)
        # The kernel wrote behind autograd's back: whoever saved these logits must hear of it and not use them.
        torch.autograd.graph.increment_version(gradient)
    else:
        gradient, ref_gradient = fresh(logits, *arguments, of_logits, of_ref_logits)
    return gradient if of_logits else None, ref_gradient if of_ref_logits else None, *(None,) * 6


class _TokenKl(torch.autograd.Function):
    """The registered op without the dispatcher, whose two Python calls cost more than the kernel on a small batch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, kernels = arguments
        output = kernels.forward(*inputs)
        _save_for_backward(ctx, kernels, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, *grads), None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "token_kl: the fused kernel has no second derivative; use impl='reference' where a gradient of the gradient is "
        "needed"
    )


LIBRARY.impl("token_kl", forward_cpu, "CPU")
LIBRARY.impl("token_kl_backward", backward_cpu, "CPU")
LIBRARY.impl("token_kl_backward_", partial(_backward_over_logits, _CPU), "CPU")
LIBRARY.impl("token_kl", on_gpu(forward_cuda, forward_triton), "CUDA")
LIBRARY.impl("token_kl_backward", on_gpu(backward_cuda, backward_triton), "CUDA")
LIBRARY.impl(
    "token_kl_backward_",
    on_gpu(partial(_backward_over_logits, _CUDA), partial(_backward_over_logits, _TRITON)),
    "CUDA",
)
torch.library.register_fake("irlfast::token_kl", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_kl_backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_kl_backward_", _backward_over_logits_fake, lib=LIBRARY)
torch.library.register_autograd("irlfast::token_kl", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("irlfast::token_kl_backward", _no_second_derivative, lib=LIBRARY)


def _run_kernels(
    kernels: _Kernels,
    logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str,
    temperature: float | Tensor,
    softcap: float | None,
    js_weight: float,
    inplace_backward: bool,
) -> Tensor:
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature = temperature.to(logits.device, statistics_dtype(logits.dtype))
        row_temperature = row_temperature.expand(logits.shape[:-1]).contiguous()
        temperature = 1.0
    arguments = (
        logits,
        ref_logits,
        row_temperature,
        temperature,
        softcap or 0.0,
        _native.DIVERGENCES[kind],
        js_weight,
        inplace_backward,
    )
    if not (runs_undispatched(logits) and runs_undispatched(ref_logits)):
        kl: Tensor = torch.ops.irlfast.token_kl(*arguments)[0]
    elif (logits.requires_grad or ref_logits.requires_grad) and torch.is_grad_enabled():
        kl = _TokenKl.apply(*arguments, kernels)[0]
    else:
        kl = kernels.forward(*arguments)[0]
    return kl


def _run_reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    kind: str,
    temperature: float | Tensor,
    softcap: float | None,
    js_weight: float,
    inplace_backward: bool,
) -> Tensor:
    if inplace_backward:
        raise RuntimeError("token_kl: inplace_backward needs a fused kernel, and the reference is selected")
    temperature = expand_temperature(temperature, logits.shape[:-1])
    return token_kl_reference(
        logits, ref_logits, kind=kind, temperature=temperature, softcap=softcap, js_weight=js_weight
    )


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run_kernels, _CPU), unavailable=cpu_kernel_unavailable),
    "cuda": Implementation(run=partial(_run_kernels, _CUDA), unavailable=cuda_unavailable),
    "triton": Implementation(run=partial(_run_kernels, _TRITON), unavailable=triton_unavailable),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


def token_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *,
    kind: Kind = "reverse",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    js_weight: float = 0.5,
    impl: str = "auto",
    inplace_backward: bool = False,
) -> Tensor:
    """Divergence between two models' token distributions at each position, over the whole vocabulary.

    Reverse KL is what a policy is held near its reference by; forward KL is that of distillation from ref_logits;
    Jensen-Shannon lies between (generalised as in Agarwal et al., arXiv 2306.13649), symmetric at js_weight = 0.5.

    Args:
        logits: the policy's, [..., V], float32, float64, bfloat16 or float16.
        ref_logits: the reference's, in the same shape and type; strides may differ.
        kind: "reverse" KL(policy || reference), "forward" KL(reference || policy), or "js".
        temperature: a positive number, or a tensor that broadcasts to [...] with one value per row; scales both. Not
            differentiable.
        softcap: c > 0 replaces each logit l of both by c tanh(l / c) before the temperature.
        js_weight: w in (0, 1), the policy's share of the mixture M; for kind="js".
        impl: "auto", "reference", "cpu", "cuda" or "triton".
        inplace_backward: let backward write the gradient of `logits` over them, for whoever computed them and needs
            them no more. Whoever else saved them for backward gets an error from autograd.

    Returns:
        The divergence in nats, [...], float32 (float64 for float64 logits). Differentiable with respect to logits and
        to ref_logits, once; a gradient that is not required costs nothing. Rounding may make it negative by about 1e-8,
        and equal rows give exactly 0. A token with logit -inf adds 0 where its distribution weighs the sum; where only
        the other lacks it, a KL divergence is +inf, and that row passes no gradient (Jensen-Shannon stays finite). A
        row without a finite maximum, or with a NaN, gives NaN in that row alone; a row whose upstream gradient is 0
        gets gradient 0 whatever it holds.

    Raises:
        TypeError: dtypes that differ or are none of the above.
        ValueError: shapes, devices, kind, temperature, softcap or js_weight; `inplace_backward` on a leaf, on logits
            that overlap themselves or share memory with ref_logits.
        RuntimeError: an `impl` that is not available here; `inplace_backward` without a fused kernel.
    """
    _check(logits, ref_logits, kind, js_weight)
    check_scaling("token_kl", temperature, softcap, logits.shape[:-1])
    if inplace_backward:
        check_inplace("token_kl", logits)
        if logits.untyped_storage().data_ptr() == ref_logits.untyped_storage().data_ptr() and logits.numel() > 0:
            raise ValueError(
                "token_kl: inplace_backward on logits that share memory with ref_logits, which backward reads; leave "
                "inplace_backward out"
            )
    result: Tensor = select("token_kl", IMPLEMENTATIONS, impl, logits).run(
        logits,
        ref_logits,
        kind=kind,
        temperature=temperature,
        softcap=softcap,
        js_weight=js_weight,
        inplace_backward=inplace_backward,
    )
    return result


def _check(logits: Tensor, ref_logits: Tensor, kind: str, js_weight: float) -> None:
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"token_kl: logits are {logits.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}")
    if ref_logits.dtype != logits.dtype:
        raise TypeError(f"token_kl: ref_logits are {ref_logits.dtype}, logits {logits.dtype}; convert one to the other")
    if logits.ndim == 0:
        raise ValueError("token_kl: logits are a single number, expected at least one dimension, the vocabulary")
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"token_kl: ref_logits have shape {tuple(ref_logits.shape)}, expected that of the logits, "
            f"{tuple(logits.shape)}"
        )
    if ref_logits.device != logits.device:
        raise ValueError(
            f"token_kl: ref_logits are on {ref_logits.device}, logits on {logits.device}; move one to the other"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"token_kl: logits of shape {tuple(logits.shape)} have an empty vocabulary")
    if kind not in KINDS:
        raise ValueError(f"token_kl: kind={kind!r} is unknown; expected one of {', '.join(map(repr, KINDS))}")
    if not 0 < js_weight < 1:
        raise ValueError(f"token_kl: js_weight = {js_weight} is not in (0, 1)")
