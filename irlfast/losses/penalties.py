"""Penalties on the slope of a reward in its pooled features, against discriminators that become steps.

    gradient penalty   E_u[(|grad f(u)| - 1)^2],  u = e x_expert + (1 - e) x_sample, e ~ U(0, 1) (Gulrajani et al. 2017)
    R1                 E_expert[|grad f(x)|^2] / 2                                              (Mescheder et al. 2018)

Text has no points between two texts; the vectors that a reward pools it into do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_penalty(
    score: Callable[[Tensor], Tensor],
    expert_features: Tensor,  # (E, F)
    sample_features: Tensor,  # (K, F)
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Squared distance of the slope from 1 at random points between demonstrations and samples: 0-d.

    Args:
        score: features [N, F] -> rewards [N], row by row.
        expert_features, sample_features: [E, F] and [K, F]; max(E, K) points are drawn, the shorter side repeated.
        generator: of the points; None is torch's global one.

    Raises:
        ValueError: widths that differ, or a side without a row.
    """
    expert, sample = expert_features.detach(), sample_features.detach()
    if (
        expert.dim() != 2
        or sample.dim() != 2
        or expert.shape[1] != sample.shape[1]
        or not len(expert)
        or not len(sample)
    ):
        raise ValueError(
            f"features have shapes {tuple(expert.shape)} and {tuple(sample.shape)}; expected [E, F] and [K, F]"
        )
    count = max(len(expert), len(sample))
    rows = torch.arange(count, device=expert.device)
    share = torch.rand(count, 1, generator=generator, dtype=torch.float32).to(expert)
    points = torch.lerp(sample[rows % len(sample)], expert[rows % len(expert)], share)
    return (_slope(score, points) - 1).square().mean()


def r1_penalty(score: Callable[[Tensor], Tensor], expert_features: Tensor) -> Tensor:
    """Half the mean squared slope at the demonstrations [E, F]: 0-d."""
    return _slope(score, expert_features.detach()).square().mean() / 2


def _slope(score: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """|grad f| at each of `points` [N, F], differentiable with respect to f's parameters: [N]."""
    points = points.requires_grad_()
    (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)
    # The norm of a zero vector has no derivative; its square does.
    return gradient.square().sum(dim=1).clamp(min=1e-24).sqrt()
