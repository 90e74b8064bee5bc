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
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.ops._segments import Groups, compute_dtype, require_floating


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


def importance_weights(
    log_target: Tensor,  # (N)
    log_proposal: Tensor,  # (N)
    *,
    groups: Tensor | None = None,  # (N)
    clip: float | tuple[float, float] | None = None,
    temper: float = 1.0,
    differentiable: bool = False,
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

    Returns:
        ImportanceWeights(weights [N], log_normalizer [G], ess [G]) in float32 (float64 where an input is float64).
        log_normalizer is of the samples as they are; clip and temper act on weights and ess. A sample of log_target
        -inf has weight 0; a group of nothing else has weights 0, log_normalizer -inf and ess 0.

    Raises:
        TypeError: a log-density is not floating point, or group ids are not integers.
        ValueError: shapes that do not fit, no sample, a bad clip or temper, or (on the CPU) a log ratio that is NaN
            or +inf. On a GPU, where looking would stall, such a group comes out NaN.
    """
    log_ratio = _checked_log_ratio(log_target, log_proposal, temper)
    bounds = clip_bounds(clip)
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


def _checked_log_ratio(log_target: Tensor, log_proposal: Tensor, temper: float) -> Tensor:
    require_floating(log_target=log_target, log_proposal=log_proposal)
    if log_target.dim() != 1 or log_proposal.shape != log_target.shape:
        raise ValueError(
            f"log_target has shape {tuple(log_target.shape)} and log_proposal {tuple(log_proposal.shape)}; "
            "expected two vectors of one length"
        )
    if not len(log_target):
        raise ValueError("log_target is empty; at least one sample is needed to estimate a normaliser")
    if not 0 <= temper < math.inf:
        raise ValueError(f"temper is {temper}; expected a finite exponent of at least 0")
    log_ratio = log_target.double() - log_proposal.double()
    if log_ratio.is_cpu:
        bad = (torch.isnan(log_ratio) | torch.isposinf(log_ratio)).nonzero()
        if len(bad):
            i = int(bad[0, 0])
            raise ValueError(
                f"log_target[{i}] - log_proposal[{i}] = {float(log_target[i])} - {float(log_proposal[i])} is not a "
                "log weight; a sample must be possible under its own proposal and its target must not be NaN or +inf"
            )
    return log_ratio
