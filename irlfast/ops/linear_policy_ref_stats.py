"""A policy's token statistics and its divergence from a reference, from the hidden states and heads of both.

With logits l = X W^T + b of the policy, r = X' W'^T + b' of the reference, and z, p, z', q of both as in `token_kl`:

    logprob, entropy, lse       of the policy, as in `token_stats`
    ref_logprob                 z'_y - log sum_v exp z'_v
    reverse_kl, forward_kl      KL(p || q) and KL(q || p), as in `token_kl`

and, with upstream gradients g, h, u of the first three, s of reverse_kl and f of forward_kl, the policy's gradient

    dz_v = p_v (u - g + h (lse - H) - h z_v) + g [v = y] + s p_v (log p_v - log q_v - KL(p || q)) + f (p_v - q_v)

from which dX, dW and db follow as in `linear_token_stats`. Neither model's logits ever exist whole: the vocabulary is
walked through in chunks, and one sweep over a chunk of both gives every sum. In units of one N x V x D product that is
2 forward and, with the logits made anew, 4 backward: 6 with training. Where no divergence receives a gradient, the
reference takes no part in backward, which is 3 then.

Rows that are ignored, or receive no gradient, are left out or not as in `linear_token_stats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_cpu import check_labels
from irlfast.ops._linear_inputs import autocast, check_linear, expand_temperature, split_temperature
from irlfast.ops._linear_pair import RUNNING, Models, Outputs, backward_pair, forward_pair
from irlfast.ops._linear_pair_cpu import CpuPairEpilogue
from irlfast.ops._linear_pair_triton import TritonPairEpilogue, backward_triton, forward_triton
from irlfast.ops._linear_parallel import linear_policy_ref_stats_over_group
from irlfast.ops._linear_plan import whole_pieces
from irlfast.ops._scaling import check_scaling
from irlfast.ops._token_stats_cpu import check_row_temperature
from irlfast.ops._triton import triton_unavailable
from irlfast.ops._vocabulary import Slice, agree, check_rows, describe, gathered, plain, take_shards
from irlfast.ops.gather_head import is_sharded
from irlfast.ops.token_kl import token_kl_reference
from irlfast.ops.token_stats import token_stats_reference


class PolicyRefStats(NamedTuple):
    """Statistics of each token under policy and reference, in nats, shaped as the labels.

    float32, or float64 where the hidden states are. Ignored rows hold 0 and pass no gradient. All but ref_logprob are
    differentiable, together, with respect to the policy.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    ref_logprob: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


def linear_policy_ref_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> PolicyRefStats:
    """The specification: whole logits of both in the statistics' type, then the references of the other ops."""
    dtype = statistics_dtype(hidden.dtype)

    def logits_of(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))

    logits = logits_of(hidden, weight, bias)
    ref_logits = logits_of(ref_hidden, ref_weight, ref_bias).detach()
    scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    stats = token_stats_reference(logits, labels, **scaling, ignore_index=ignore_index)
    ref_stats = token_stats_reference(ref_logits, labels, **scaling, ignore_index=ignore_index)
    ignored = labels == ignore_index
    logits, ref_logits = (x.masked_fill(ignored.unsqueeze(-1), 0.0) for x in (logits, ref_logits))
    reverse_kl, forward_kl = (
        token_kl_reference(logits, ref_logits, kind=kind, **scaling) for kind in ("reverse", "forward")
    )
    return PolicyRefStats(*stats, ref_stats.logprob, reverse_kl, forward_kl)


# hidden [N, D], ref_hidden [N, D'], labels int64 [N]; row_temperature, where given, replaces temperature, one a row,
# contiguous in the statistics' type; softcap 0 means none. Besides the six statistics [N] the op returns running [9, N]
# float64, what the gradient needs of each row.
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
    "Tensor labels, Tensor? row_temperature, float temperature, float softcap, int ignore_index, int chunk"
)
LIBRARY.define(f"linear_policy_ref_stats({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_policy_ref_stats_backward({_ARGUMENTS}, Tensor running, Tensor? grad_logprob, Tensor? grad_entropy, "
    "Tensor? grad_lse, Tensor? grad_reverse_kl, Tensor? grad_forward_kl, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)


def _forward_cpu(
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
) -> Outputs:
    check_labels(labels, weight.shape[0], ignore_index)
    if row_temperature is not None:
        check_row_temperature(row_temperature)
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap, ref_hidden)
    models = Models(weight, bias, ref_weight, ref_bias)
    return forward_pair(CpuPairEpilogue(), hidden, models, rows, ignore_index, chunk)


def _backward_cpu(
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
    running: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(labels.contiguous(), row_temperature, temperature, softcap, ref_hidden)
    models = Models(weight, bias, ref_weight, ref_bias)
    upstream = Upstream(grad_logprob, grad_entropy, grad_lse, grad_reverse_kl, grad_forward_kl)
    return backward_pair(CpuPairEpilogue(), hidden, models, rows, ignore_index, chunk, running, upstream, needs)


_CPU = Kernels(_forward_cpu, _backward_cpu)
_TRITON = Kernels(forward_triton, backward_triton)


def _forward_fake(hidden: Tensor, *rest: object) -> Outputs:
    count = hidden.shape[0]
    statistics = [hidden.new_empty((count,), dtype=statistics_dtype(hidden.dtype)) for _ in PolicyRefStats._fields]
    return (*statistics, hidden.new_empty((RUNNING, count), dtype=torch.float64))  # type: ignore[return-value]


def _backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sources = (hidden, weight, hidden if bias is None else bias)
    return tuple(  # type: ignore[return-value]
        source.new_empty(source.shape) if needed else hidden.new_empty((0,))
        for source, needed in zip(sources, rest[-1], strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[6])
    ctx.save_for_backward(*tensors, output[6])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _differentiate(torch.ops.irlfast.linear_policy_ref_stats_backward, ctx, ctx.needs_input_grad[:3], grads)


def _differentiate(
    run: Callable[..., tuple[Tensor, ...]], ctx: Any, needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    *tensors, running = ctx.saved_tensors
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.chunk)
    grad_logprob, grad_entropy, grad_lse, _, grad_reverse_kl, grad_forward_kl, _ = grads
    needs = [bool(need) for need in needed]
    gradients = run(
        *tensors, *options, running, grad_logprob, grad_entropy, grad_lse, grad_reverse_kl, grad_forward_kl, needs
    )
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * 9)


class _LinearPolicyRefStats(torch.autograd.Function):
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
        run = ctx.kernels.backward if direct else torch.ops.irlfast.linear_policy_ref_stats_backward
        return None, *_differentiate(run, ctx, ctx.needs_input_grad[1:4], grads)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "linear_policy_ref_stats: the fused kernel has no second derivative; use impl='reference' where a gradient of "
        "the gradient is needed"
    )


_NAME = "irlfast::linear_policy_ref_stats"
LIBRARY.impl("linear_policy_ref_stats", _forward_cpu, "CPU")
LIBRARY.impl("linear_policy_ref_stats_backward", _backward_cpu, "CPU")
LIBRARY.impl("linear_policy_ref_stats", forward_triton, "CUDA")  # AMD's GPUs have the key too
LIBRARY.impl("linear_policy_ref_stats_backward", backward_triton, "CUDA")
torch.library.register_fake(_NAME, _forward_fake, lib=LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd(f"{_NAME}_backward", _no_second_derivative, lib=LIBRARY)


def _run_kernels(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    chunk: int | None,
) -> PolicyRefStats:
    shape = labels.shape
    temperature, row_temperature = split_temperature(temperature, shape, hidden.dtype)
    run: Callable[..., Outputs] = torch.ops.irlfast.linear_policy_ref_stats
    if kernels is _TRITON and all(map(runs_undispatched, (hidden, weight, ref_hidden, ref_weight))):
        run = partial(_LinearPolicyRefStats.apply, kernels)
    *statistics, _ = run(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        labels.reshape(-1).long(),
        row_temperature,
        temperature,
        softcap or 0.0,
        ignore_index,
        0 if chunk is None else whole_pieces(chunk),  # the plan's choice
    )
    return PolicyRefStats(*(t.view(shape) for t in statistics))


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    chunk: int | None,
    **options: Any,
) -> PolicyRefStats:
    """Whole logits: chunk has nothing to decide."""
    temperature = expand_temperature(temperature, labels.shape)
    return linear_policy_ref_stats_reference(
        hidden, weight, ref_hidden, ref_weight, labels, temperature=temperature, **options
    )


def _reference_over_group(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    part: Slice,
    *,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    **options: Any,
) -> PolicyRefStats:
    """The whole heads on every rank."""
    bias, ref_bias = (None if b is None else gathered(b, part) for b in (bias, ref_bias))
    heads = gathered(weight, part), gathered(ref_weight, part)
    return _run_reference(hidden, heads[0], ref_hidden, heads[1], labels, bias=bias, ref_bias=ref_bias, **options)


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run_kernels, _CPU), unavailable=cpu_kernel_unavailable),
    "cuda": not_in_this_release("CUDA"),
    "triton": Implementation(run=partial(_run_kernels, _TRITON), unavailable=triton_unavailable),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}

# The same over a vocabulary that is split; how a rank's columns are worked on.
OVER_GROUP = {
    "cpu": replace(
        IMPLEMENTATIONS["cpu"], run=partial(linear_policy_ref_stats_over_group, lambda *given: CpuPairEpilogue())
    ),
    "triton": replace(IMPLEMENTATIONS["triton"], run=partial(linear_policy_ref_stats_over_group, TritonPairEpilogue)),
    "reference": replace(IMPLEMENTATIONS["reference"], run=_reference_over_group),
}


@torch._disable_dynamo  # ranks talk to each other outside of graphs
def _over_group(
    group: Any,
    check: Callable[[], None],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    impl: str,
    **options: Any,
) -> PolicyRefStats:
    op = "linear_policy_ref_stats"
    hidden, weight, _, _, labels = tensors
    temperature, softcap, ignore_index = (options[name] for name in ("temperature", "softcap", "ignore_index"))

    def check_all() -> None:
        check()
        select(op, OVER_GROUP, impl, hidden)

    def facts() -> dict[str, int]:
        return describe(hidden, labels, temperature, softcap, ignore_index, options["bias"], options["ref_bias"])

    part = agree(op, group, hidden.device, weight.shape[0], check_all, facts)
    check_rows(labels, temperature, part.vocab, ignore_index)
    return PolicyRefStats(*select(op, OVER_GROUP, impl, hidden).run(*tensors, part, **options))


def linear_policy_ref_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D')
    ref_weight: Tensor,  # (V, D')
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V)
    ref_bias: Tensor | None = None,  # (V)
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk: int | None = None,
    group: Any = None,
) -> PolicyRefStats:
    """Log-prob, entropy and log-sum-exp of a policy, log-prob of a reference, and both KL divergences between them.

    Args:
        hidden: the policy's, [..., D], float32, float64, bfloat16 or float16. Under autocast, hidden states, weights
            and biases are cast as torch.nn.functional.linear would have them.
        weight: [V, D], the policy's output head in its hidden states' type.
        ref_hidden: the reference's, [..., D'], of the same positions; another width and another type are allowed, but
            float64 only where both are.
        ref_weight: [V, D'], the reference's output head, over the same vocabulary.
        labels: [...], integers in [0, V), or `ignore_index`.
        bias, ref_bias: [V].
        temperature: a positive number, or a tensor that broadcasts to [...] with one value per row; scales both. Not
            differentiable.
        softcap: c > 0 replaces each logit l of both by c tanh(l / c) before the temperature.
        ignore_index: rows with this label give 0, no gradient, and (on the CPU) cost no product.
        impl: "auto", "reference", "cpu", "cuda" or "triton". The reference makes the logits whole.
        chunk: columns of the vocabulary worked on at a time, rounded up to a multiple of 2048; None leaves them to the
            plan, as in `linear_token_stats`. What is summed per row does not depend on it. On the CPU up to 16 MiB of
            logits of each model are worked on at a time.
        group: a torch.distributed process group over whose ranks the vocabulary of both is split, as in
            `linear_token_stats`: weights and biases are this rank's columns, the same of both models.

    Returns:
        PolicyRefStats(logprob, entropy, lse, ref_logprob, reverse_kl, forward_kl), each [...], float32 (float64 for
        float64 input). All but ref_logprob are differentiable together with respect to hidden, weight and bias, once;
        the reference receives no gradient, whether it asks for one or not. Infinite and undefined divergences are as
        in `token_kl`. A row that receives no gradient enters no product of backward (on the CPU) and gets exactly 0.

    Raises:
        IndexError: a label is outside [0, V) and not `ignore_index` (on the CPU; on a GPU that row is NaN).
        TypeError: dtypes that differ or are none of the above.
        ValueError: shapes, devices, temperature, softcap or chunk; ranks that were given other rows or options, on
            every rank.
        RuntimeError: an `impl` that is not available here.
    """
    op = "linear_policy_ref_stats"
    hidden, weight, bias = autocast(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = autocast(ref_hidden, ref_weight, ref_bias)
    if group is not None or any(map(is_sharded, (hidden, weight, ref_hidden, ref_weight))):
        ref_group = group
        hidden, weight, bias, group = take_shards(op, hidden, weight, bias, group)
        labels = plain(labels)
        ref_hidden, ref_weight, ref_bias, _ = take_shards(op, ref_hidden, ref_weight, ref_bias, ref_group or group)

    def check() -> None:
        check_linear(op, hidden, weight, labels, bias, 0, chunk)
        check_linear(f"{op}, of the reference", ref_hidden, ref_weight, labels, ref_bias, 0, chunk)
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: ref_weight has {ref_weight.shape[0]} tokens, weight {weight.shape[0]}; the divergence needs "
                "one vocabulary"
            )
        if statistics_dtype(ref_hidden.dtype) != statistics_dtype(hidden.dtype):
            raise TypeError(f"{op}: ref_hidden is {ref_hidden.dtype}, hidden {hidden.dtype}; only both may be float64")
        check_scaling(op, temperature, softcap, labels.shape)

    options: dict[str, Any] = {
        "bias": bias,
        "ref_bias": ref_bias,
        "temperature": temperature,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "chunk": chunk,
    }
    tensors = (hidden, weight, ref_hidden, ref_weight, labels)
    if group is not None:
        return _over_group(group, check, tensors, impl, **options)
    check()
    result: PolicyRefStats = select(op, IMPLEMENTATIONS, impl, hidden).run(*tensors, **options)
    return result
