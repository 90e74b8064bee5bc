"""Running mean and standard deviation of the rewards that are served to the policy.

Batches are merged by count (Chan, Golub and LeVeque, 1979), in float64:

    n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n

so the result does not depend on how the rewards were cut into batches. std is the population's, sqrt(M2 / n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RewardNormalizer(nn.Module):
    """Bring rewards to mean 0 and standard deviation 1, by what was seen so far.

    It stands between a reward model and the policy, never inside the reward's own loss. Its state is part of
    `state_dict()`, so that a resumed run goes on with the same numbers; it stays float64 when the module is cast.

    Args:
        half_life: number of rewards after which an old reward counts half, for a reward that changes as it learns;
            None counts all rewards alike.
        clip: bound on the absolute value of normalised rewards, or None.
        epsilon: a standard deviation at most this large counts as 0: rewards are then centred and not scaled.

    Raises:
        ValueError: an argument that is not above 0.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, *, half_life: float | None = None, clip: float | None = None, epsilon: float = 1e-8) -> None:
        super().__init__()
        for name, value in (("half_life", half_life), ("clip", clip), ("epsilon", epsilon)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.half_life = half_life
        self.clip = clip
        self.epsilon = epsilon
        for name in ("count", "mean", "m2"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        """0-d float64, the population standard deviation so far; 0 before the first update."""
        return (self.m2 / self.count.clamp(min=1e-300)).sqrt()

    @property
    def scale(self) -> float:
        """What `normalize` divides by: 1 before the first update and for rewards that do not vary."""
        std = float(self.std)
        return std if std > self.epsilon else 1.0

    @torch.no_grad()
    def update(self, rewards: Tensor) -> None:
        """Take in raw rewards, of any shape; none is no change.

        Raises:
            ValueError: a reward that is not finite.
        """
        values = rewards.detach().to(device=self.mean.device, dtype=torch.float64).flatten()
        if values.numel() == 0:
            return
        finite = values.isfinite()
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0])
            raise ValueError(f"rewards[{index}] = {float(values[index])} is not finite: the reward model has diverged")
        if self.half_life is not None:
            kept = 0.5 ** (values.numel() / self.half_life)
            self.count.mul_(kept)
            self.m2.mul_(kept)
        mean = values.mean()
        total = self.count + values.numel()
        difference = mean - self.mean
        self.m2.add_((values - mean).square().sum() + difference.square() * self.count * values.numel() / total)
        self.mean.add_(difference * (values.numel() / total))
        self.count.copy_(total)

    def normalize(self, rewards: Tensor) -> Tensor:
        """(rewards - mean) / std, in the shape and dtype of `rewards`; unchanged before the first update."""
        if float(self.count) == 0.0:
            normalised = rewards
        else:
            normalised = ((rewards.double() - self.mean) / self.scale).to(rewards.dtype)
        return normalised if self.clip is None else normalised.clamp(-self.clip, self.clip)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RewardNormalizer:
        # A cast of the whole model (.to(bfloat16)) must not round the statistics; a move to a device applies to them.
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self
