"""Self-normalised importance weights, within each group, in log space.

For K samples y_k of one group, drawn from q and meant to stand for an unnormalised target p~:

    l_k = log p~(y_k) - log q(y_k)
    log Z_hat = logsumexp_k l_k - log K
    w_k = softmax_k(temper * clip(l_k)),      ESS = 1 / sum_k w_k^2

(Owen, "Monte Carlo theory, methods and examples", chapter 9; ESS: Kong 1992). In maximum-entropy inverse RL one group
is one prompt's samples and log p~ = r / beta + log b. Only differences of l within a group carry information, for the
target is unnormalised; so clipping acts on l_k - log Z_hat, the log of K times the plain self-normalised weight.
`clip=c` keeps every sample between e^-c and e^c times the average weight, whatever the level of the reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._cuda import cuda_unavailable, on_gpu
from irlfast.ops._dispatch import (
    DTYPE_CODES,
    LIBRARY,
    Implementation,
    Kernels,
    address,
    cpu_kernel_unavailable,
    runs_undispatched,
    select,
)
from irlfast.ops._importance_cuda import backward_cuda, forward_cuda
from irlfast.ops._importance_triton import backward_triton, forward_triton
from irlfast.ops._segments import Groups, check_groups, compute_dtype, require_floating
from irlfast.ops._segments_triton import triton_takes


class ImportanceWeights(NamedTuple):
    """weights [N] sum to 1 in each group. log_normalizer [G] is log Z_hat, and ess [G] lies in [1, K], one a group:
    groups stand in ascending order of their ids."""

    weights: Tensor
    log_normalizer: Tensor
    ess: Tensor


def importance_weights_reference(
    log_target: Tensor,
    log_proposal: Tensor,
    *,
    groups: Tensor | None = None,
    clip: float | tuple[float, float] | None = None,
    temper: float = 1.0,
) -> ImportanceWeights:
    """The definition, one group after the other in float64, for finite input. Arguments as `importance_weights`."""
    log_ratio = log_target.double() - log_proposal.double()
    ids = [0] * len(log_ratio) if groups is None else groups.tolist()
    weights = torch.zeros_like(log_ratio)
    normalizers, sizes = [], []
    for name in sorted(set(ids)):
        rows = [i for i, row_id in enumerate(ids) if row_id == name]
        ratio = log_ratio[rows]
        normalizer = torch.log(torch.exp(ratio - ratio.max()).mean()) + ratio.max()
        tempered = ratio - normalizer
        if clip is not None:
            low, high = clip if isinstance(clip, tuple) else (-clip, clip)
            tempered = torch.clamp(tempered, low, high)
        share = torch.softmax(temper * tempered, dim=0)
        weights[rows] = share
        normalizers.append(normalizer)
        sizes.append(1 / (share**2).sum())
    return ImportanceWeights(weights, torch.stack(normalizers), torch.stack(sizes))


# The op: both [N] in float32 or float64, groups int64. Normalisers and ESS have one entry a group.
LIBRARY.define(
    "importance_weights(Tensor log_target, Tensor log_proposal, Tensor? groups, float low, float high, float temper)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "importance_weights_backward(Tensor log_target, Tensor log_proposal, Tensor? groups, float low, float high, "
    "float temper, Tensor? grad_weights, Tensor? grad_log_normalizer, Tensor? grad_ess) -> Tensor"
)

Weights = tuple[Tensor, Tensor, Tensor]


def forward_cpu(
    log_target: Tensor,
    log_proposal: Tensor,
    groups: Tensor | None,
    low: float,
    high: float,
    temper: float,
    *,
    isa: str = "auto",
) -> Weights:
    """The native forward; `isa` names the instruction set, for tests."""
    log_target, log_proposal = log_target.contiguous(), log_proposal.contiguous()
    groups = None if groups is None else groups.contiguous()
    rows = log_target.shape[0]
    weights = torch.empty_like(log_target)
    if groups is None:
        log_normalizer, ess = log_target.new_empty((1,)), log_target.new_empty((1,))
    else:
        log_normalizer, ess = torch.empty_like(log_target), torch.empty_like(log_target)
    count = _native.importance_weights_forward(
        log_target.data_ptr(),
        log_proposal.data_ptr(),
        DTYPE_CODES[log_target.dtype],
        rows,
        address(groups),
        low,
        high,
        temper,
        weights.data_ptr(),
        log_normalizer.data_ptr(),
        ess.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    if count < 0:
        _raise_log_ratio(log_target, log_proposal, -count - 1)
    if groups is None:
        return weights, log_normalizer, ess
    return weights, log_normalizer[:count], ess[:count]


def backward_cpu(
    log_target: Tensor,
    log_proposal: Tensor,
    groups: Tensor | None,
    low: float,
    high: float,
    temper: float,
    grad_weights: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_ess: Tensor | None,
    *,
    isa: str = "auto",
) -> Tensor:
    """The native gradient to log_target; its negative is that to log_proposal."""
    log_target, log_proposal = log_target.contiguous(), log_proposal.contiguous()
    groups, grad_weights, grad_log_normalizer, grad_ess = (
        None if x is None else x.contiguous() for x in (groups, grad_weights, grad_log_normalizer, grad_ess)
    )
    gradient = torch.empty_like(log_target)
    _native.importance_weights_backward(
        log_target.data_ptr(),
        log_proposal.data_ptr(),
        DTYPE_CODES[log_target.dtype],
        log_target.shape[0],
        address(groups),
        low,
        high,
        temper,
        address(grad_weights),
        address(grad_log_normalizer),
        address(grad_ess),
        gradient.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return gradient


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Weights) -> None:
    log_target, log_proposal, groups, ctx.low, ctx.high, ctx.temper = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_target, log_proposal, groups)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, torch.ops.irlfast.importance_weights_backward, grads, ctx.needs_input_grad[1])


def _gradients(
    ctx: Any, run: Callable[..., Tensor], grads: tuple[Tensor | None, ...], to_proposal: bool
) -> tuple[Tensor | None, ...]:
    log_target, log_proposal, groups = ctx.saved_tensors
    gradient = run(log_target, log_proposal, groups, ctx.low, ctx.high, ctx.temper, *grads)
    return gradient, -gradient if to_proposal else None, None, None, None, None


class _ImportanceWeights(torch.autograd.Function):
    """The registered op without the dispatcher, which costs more than the kernel."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, *inputs: Any) -> Weights:
        output: Weights = kernels.forward(*inputs)
        ctx.kernels = kernels
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: Callable[..., Tensor] = ctx.kernels.backward
        if torch.is_grad_enabled() or not runs_undispatched(ctx.saved_tensors[0]):
            run = torch.ops.irlfast.importance_weights_backward
        return None, *_gradients(ctx, run, grads, ctx.needs_input_grad[2])


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "importance_weights has no second derivative; where a gradient of the gradient is needed, write the softmax of "
        "each group's log ratios in plain torch"
    )


def _forward_fake(
    log_target: Tensor, log_proposal: Tensor, groups: Tensor | None, low: float, high: float, temper: float
) -> Weights:
    # How many groups there are, only the data can tell.
    count = 1 if groups is None else torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(log_target), log_target.new_empty((count,)), log_target.new_empty((count,))


def _backward_fake(log_target: Tensor, *args: object) -> Tensor:
    return torch.empty_like(log_target)


LIBRARY.impl("importance_weights", forward_cpu, "CPU")
LIBRARY.impl("importance_weights_backward", backward_cpu, "CPU")
LIBRARY.impl("importance_weights", on_gpu(forward_cuda, forward_triton), "CUDA")
LIBRARY.impl("importance_weights_backward", on_gpu(backward_cuda, backward_triton), "CUDA")
torch.library.register_fake("irlfast::importance_weights", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::importance_weights_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("irlfast::importance_weights", _backward, setup_context=_save_for_backward, lib=LIBRARY)
torch.library.register_autograd("irlfast::importance_weights_backward", _no_second_derivative, lib=LIBRARY)


def _run(
    kernels: Kernels,
    log_target: Tensor,
    log_proposal: Tensor,
    groups: Tensor | None,
    bounds: tuple[float, float] | None,
    temper: float,
    differentiable: bool,
) -> ImportanceWeights:
    dtype = log_target.dtype
    if dtype != log_proposal.dtype or dtype not in (torch.float32, torch.float64):
        dtype = compute_dtype(log_target, log_proposal)
        log_target, log_proposal = log_target.to(dtype), log_proposal.to(dtype)
    if groups is not None and groups.dtype != torch.int64:
        groups = groups.long()
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if runs_undispatched(log_target):
        wanted = differentiable and torch.is_grad_enabled()
        run = partial(_ImportanceWeights.apply, kernels) if wanted else kernels.forward
        return ImportanceWeights(*run(log_target, log_proposal, groups, low, high, temper))
    if not differentiable:
        log_target, log_proposal = log_target.detach(), log_proposal.detach()
    return ImportanceWeights(*torch.ops.irlfast.importance_weights(log_target, log_proposal, groups, low, high, temper))


def _run_reference(
    log_target: Tensor,
    log_proposal: Tensor,
    groups: Tensor | None,
    bounds: tuple[float, float] | None,
    temper: float,
    differentiable: bool,
) -> ImportanceWeights:
    """All groups at once, on any device."""
    log_ratio = log_target.double() - log_proposal.double()
    if log_ratio.is_cpu and not torch.compiler.is_compiling():
        bad = (torch.isnan(log_ratio) | torch.isposinf(log_ratio)).nonzero()
        if len(bad):
            _raise_log_ratio(log_target, log_proposal, int(bad[0, 0]))
    if not differentiable:
        log_ratio = log_ratio.detach()
    by_group = Groups.of(groups, log_ratio)
    log_normalizer = by_group.logsumexp(log_ratio) - by_group.counts.double().log()
    log_weights = temper_log_ratio(log_ratio, log_normalizer[by_group.index], bounds, temper)
    total = by_group.logsumexp(log_weights)
    possible = ~torch.isneginf(log_weights)
    # Impossible samples are set apart before exp: -inf minus the -inf of a group that has no other is NaN.
    exponent = torch.where(possible, log_weights, 0.0) - torch.where(torch.isneginf(total), 0.0, total)[by_group.index]
    weights = torch.where(possible, torch.exp(exponent), 0.0)
    squares = by_group.sum(weights.square())
    ess = torch.where(squares == 0, 0.0, 1 / torch.where(squares == 0, 1.0, squares))
    dtype = compute_dtype(log_target, log_proposal)
    return ImportanceWeights(weights.to(dtype), log_normalizer.to(dtype), ess.to(dtype))


IMPLEMENTATIONS = {
    "cpu": Implementation(run=partial(_run, Kernels(forward_cpu, backward_cpu)), unavailable=cpu_kernel_unavailable),
    "cuda": Implementation(run=partial(_run, Kernels(forward_cuda, backward_cuda)), unavailable=cuda_unavailable),
    "triton": Implementation(run=partial(_run, Kernels(forward_triton, backward_triton)), unavailable=triton_takes),
    "reference": Implementation(run=_run_reference, unavailable=lambda tensor: None),
}


def importance_weights(
    log_target: Tensor,  # (N)
    log_proposal: Tensor,  # (N)
    *,
    groups: Tensor | None = None,  # (N)
    clip: float | tuple[float, float] | None = None,
    temper: float = 1.0,
    differentiable: bool = False,
    impl: str = "auto",
) -> ImportanceWeights:
    """Weights that turn samples of a proposal into expectations under a target known up to a factor a group.

    Args:
        log_target: [N] log p~ of each sample, in nats, up to a constant in each group.
        log_proposal: [N] log q of each sample under the sampler that drew it, with its temperature, top-p and top-k.
        groups: [N] integer group ids, in any order, groups of any size; None makes one group of all samples.
        clip: bounds on a sample's log weight relative to its group's average: a positive number c for (-c, c), or
            (low, high). Trades bias for variance (truncated importance sampling, Ionides 2008). Without it, none.
        temper: exponent on the weights, at least 0: 1 leaves them, 0 makes them equal.
        differentiable: let gradients pass to log_target and log_proposal. By default everything is detached.
            There is no second derivative.
        impl: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        ImportanceWeights(weights [N], log_normalizer [G], ess [G]) in float32 (float64 where an input is float64).
        log_normalizer is of the samples as they are; clip and temper act on weights and ess. A sample of log_target
        -inf has weight 0; a group of nothing else has weights 0, log_normalizer -inf and ess 0.

    Raises:
        TypeError: a log-density is not floating point, or group ids are not integers.
        ValueError: shapes that do not fit, no sample, a bad clip or temper, or (on the CPU) a log ratio that is NaN
            or +inf. On a GPU, where looking would stall, such a group comes out NaN; with ids in `groups` their number
            alone is read back, for it is the shape of the results.
        RuntimeError: an `impl` that is not available here.
    """
    if not (log_target.is_floating_point() and log_proposal.is_floating_point()):
        require_floating(log_target=log_target, log_proposal=log_proposal)
    if log_target.ndim != 1 or log_proposal.shape != log_target.shape:
        raise ValueError(
            f"log_target has shape {tuple(log_target.shape)} and log_proposal {tuple(log_proposal.shape)}; "
            "expected two vectors of one length"
        )
    if log_target.shape[0] == 0:
        raise ValueError("log_target is empty; at least one sample is needed to estimate a normaliser")
    if log_proposal.device != log_target.device:
        raise ValueError(
            f"log_proposal is on {log_proposal.device}, log_target on {log_target.device}; move one to the other"
        )
    if not 0 <= temper < math.inf:
        raise ValueError(f"temper is {temper}; expected a finite exponent of at least 0")
    bounds = clip_bounds(clip)
    if groups is not None:
        check_groups(groups, log_target)
        groups = groups.to(log_target.device)
    implementation = select("importance_weights", IMPLEMENTATIONS, impl, log_target)
    result: ImportanceWeights = implementation.run(log_target, log_proposal, groups, bounds, temper, differentiable)
    return result


def clip_bounds(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """Normalise the `clip` argument to (low, high), or None; ValueError for anything else."""
    if clip is None:
        return None
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    if not low < high:
        raise ValueError(f"clip is {clip}; expected a positive number, or (low, high) with low < high")
    return float(low), float(high)


def temper_log_ratio(
    log_ratio: Tensor, log_normalizer: Tensor, bounds: tuple[float, float] | None, temper: float
) -> Tensor:
    """temper * clip(l - log Z_hat), leaving -inf as it is: what cannot occur under the target stays so.

    All [N]; log_normalizer is that of each sample's group.
    """
    possible = ~torch.isneginf(log_ratio)
    relative = torch.where(possible, log_ratio, 0.0) - torch.where(possible, log_normalizer, 0.0)
    if bounds is not None:
        relative = relative.clamp(*bounds)
    return torch.where(possible, temper * relative, -torch.inf)


def _raise_log_ratio(log_target: Tensor, log_proposal: Tensor, i: int) -> None:
    raise ValueError(
        f"log_target[{i}] - log_proposal[{i}] = {float(log_target[i])} - {float(log_proposal[i])} is not a "
        "log weight; a sample must be possible under its own proposal and its target must not be NaN or +inf"
    )
