"""The part that reward models on pooled features share: standardise, an MLP or a linear map, a bound.

r = f((pooled - mean) / std),   f an MLP, or linear;  c tanh(r / c) where a bound c is given
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import BaseRewardModel, TokenRewards, evaluating, prefix_differences
from .pooling import pool, pooling_kinds

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def require_positive_int(name: str, value: object) -> None:
    """Raise ``ValueError`` for anything but an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be positive integers, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """From pooled hidden states to a reward.

    Args:
        hidden_sizes: widths of the hidden layers; () is a linear reward.
        pooling: "last", "mean" or "max", or several of them, put side by side.
        activation: "relu", "gelu", "silu" or "tanh".
        dropout: probability, after each activation, in training mode.
        layer_norm: normalise the pooled features of each row.
        bias: give the output a constant term. The reward's level means nothing to the policy, so a linear reward may
            do without.
        output_bound: keep the reward inside (-output_bound, output_bound); None leaves it free.

    Raises:
        ValueError: a value out of its range.
    """

    hidden_sizes: tuple[int, ...] = (128,)
    pooling: str | tuple[str, ...] = "last"
    activation: str = "gelu"
    dropout: float = 0.0
    layer_norm: bool = False
    bias: bool = True
    output_bound: float | None = None

    def __post_init__(self) -> None:
        # A configuration read back from JSON has lists here.
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if not isinstance(self.pooling, str):
            object.__setattr__(self, "pooling", tuple(self.pooling))
        pooling_kinds(self.pooling)
        for size in self.hidden_sizes:
            require_positive_int("hidden_sizes", size)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown, expected one of {tuple(ACTIVATIONS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.output_bound is not None and not self.output_bound > 0.0:
            raise ValueError(f"output_bound must be above 0, or None for no bound, got {self.output_bound}")

    @property
    def is_additive(self) -> bool:
        """Whether the reward is a mean of terms, one a token."""
        linear = not self.hidden_sizes and not self.layer_norm and self.output_bound is None
        return linear and pooling_kinds(self.pooling) == ("mean",)


class PooledRewardModel(BaseRewardModel):
    """A reward that reads one vector of features a response: forward = head(features(*inputs)).

    Args:
        config: a HeadConfig.
        width: H of the hidden states that are pooled.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__(config)
        features = width * len(pooling_kinds(config.pooling))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        layers: list[nn.Module] = [nn.LayerNorm(features)] if config.layer_norm else []
        size = features
        for hidden_size in config.hidden_sizes:
            layers += [nn.Linear(size, hidden_size), ACTIVATIONS[config.activation]()]
            if config.dropout > 0.0:
                layers.append(nn.Dropout(config.dropout))
            size = hidden_size
        layers.append(nn.Linear(size, 1, bias=config.bias))
        self.network = nn.Sequential(*layers)

    @abstractmethod
    def states(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, H] and the mask [B, S] to pool them over, of the inputs of `forward`."""

    def features(self, *inputs: Any, **named: Any) -> Tensor:
        """Pooled and standardised features [B, F], what the head reads; differentiable."""
        return self.standardise(pool(*self.states(*inputs, **named), self.config.pooling))

    def head(self, features: Tensor) -> Tensor:
        """Raw rewards of standardised features: [..., F] -> [...], float32 (float64 for a float64 model)."""
        reward: Tensor = self.network(features)[..., 0]
        if reward.dtype != torch.float64:
            reward = reward.float()
        bound = self.config.output_bound
        return reward if bound is None else bound * torch.tanh(reward / bound)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Raw rewards [B], float32 (float64 for a float64 model). Positions outside the mask are not read."""
        return self.head(self.features(*inputs, **named))

    @property
    def has_token_rewards(self) -> bool:
        return True

    @torch.no_grad()
    def token_rewards(self, *inputs: Any, **named: Any) -> TokenRewards:
        """The terms of a linear reward on mean-pooled states ("mean"); for any other an attribution.

        With pooling "last" it is what the reward changed at each token, the average features before the first (a causal
        model's states: those of a prefix do not know what follows). With other poolings it is integrated gradients
        (Sundararajan et al. 2017, arXiv 1703.01365) from the average features to the response's, each feature's share
        given to the tokens that it was pooled from. What the quadrature misses is shared evenly.
        """
        with evaluating(self):
            states, mask = self.states(*inputs, **named)
            if self.config.is_additive:
                terms = self.head(self.standardise(states))
                return TokenRewards(terms.masked_fill(~mask, 0.0), "mean")
            average = self.head(torch.zeros_like(self.feature_mean)).expand(mask.shape[0])
            if pooling_kinds(self.config.pooling) == ("last",):
                return prefix_differences(self.head(self.standardise(states)), mask, average)
            features = self.standardise(pool(states, mask, self.config.pooling))
            values = self._shares(states, mask, features, _integrated_gradient(self.head, features))
            missed = self.head(features) - values.sum(1)
        values = values + (missed / mask.sum(1).clamp(min=1))[:, None]
        return TokenRewards(values.masked_fill(~mask, 0.0), "attribution")

    def _shares(self, states: Tensor, mask: Tensor, features: Tensor, gradient: Tensor) -> Tensor:
        """[B, S], features [B, F] times gradient [B, F], given to the tokens that each feature was pooled from."""
        shares = torch.zeros(mask.shape, dtype=features.dtype, device=features.device)
        kinds = pooling_kinds(self.config.pooling)
        parts = (x.chunk(len(kinds), dim=-1) for x in (features, gradient, self.feature_mean, self.feature_std))
        for kind, feature, slope, mean, std in zip(kinds, *parts, strict=True):
            if kind == "mean":
                scaled = (states.to(mean.dtype) - mean) / std
                terms = (scaled * slope[:, None]).sum(2) / mask.sum(1, keepdim=True).clamp(min=1)
                shares = shares + terms.masked_fill(~mask, 0.0)
            else:
                masked = states.masked_fill(~mask[..., None], float("-inf"))
                steps = torch.arange(mask.shape[1], device=mask.device)
                last = torch.where(mask, steps, 0).amax(1, keepdim=True).expand(feature.shape)
                shares = shares.scatter_add(1, masked.argmax(1) if kind == "max" else last, feature * slope)
        return shares

    def standardise(self, pooled: Tensor) -> Tensor:
        """Pooled features [..., F] in the units that `head` reads."""
        return (pooled.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def fit_feature_scale(self, *inputs: Any, **named: Any) -> None:
        """Set the mean and standard deviation that the pooled features are brought to 0 and 1 by.

        A language model's hidden states differ in scale by orders of magnitude between features; without this a few of
        them carry the reward. The statistics are saved with the model. A feature that never varies is only centred.
        Rows with an empty mask are left out.

        Raises:
            ValueError: fewer than two rows, or a feature that is not finite.
        """
        with evaluating(self):
            states, mask = self.states(*inputs, **named)
        rows = mask.any(1)
        mean, std = feature_scale(pool(states[rows], mask[rows], self.config.pooling))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)


def _integrated_gradient(function: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Mean gradient [B, F] of `function` on the line from 0 to each of the features [B, F] (Gauss-Legendre)."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    total = torch.zeros_like(features)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        with torch.enable_grad():
            point = ((node + 1) / 2 * features).requires_grad_()
            (gradient,) = torch.autograd.grad(function(point).sum(), point)
        total += weight / 2 * gradient
    return total


def feature_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [F] of features [N, F]; the standard deviation of one that never varies is 1.

    Raises:
        ValueError: fewer than two rows, or a feature that is not finite.
    """
    rows = rows.double()
    if rows.shape[0] < 2:
        raise ValueError(f"fit_feature_scale needs at least 2 rows with a non-empty mask, got {rows.shape[0]}")
    if not bool(rows.isfinite().all()):
        row, feature = (~rows.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"pooled feature {feature} of row {row} is not finite: check the hidden states")
    std, mean = torch.std_mean(rows, dim=0, correction=0)
    # Below this, rounding of the hidden states is all that varies.
    constant = std <= 1e-6 * mean.abs()
    return mean, std.masked_fill(constant | (std == 0), 1.0)
