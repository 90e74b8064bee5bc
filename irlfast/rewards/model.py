"""A reward for a response: a small network on pooled hidden states of a language model.

r(x, y) = f((pool(h, m) - mean) / std),   f an MLP, or linear;  c tanh(r / c) where a bound c is given
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .normalizer import RewardNormalizer
from .pooling import pool, pooling_kinds

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """The shape of a RewardModel.

    Args:
        hidden_size: H, the width of the hidden states it reads.
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

    hidden_size: int
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
        for name, width in (("hidden_size", self.hidden_size), *(("hidden_sizes", w) for w in self.hidden_sizes)):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be positive integers, got {width!r}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown, expected one of {tuple(_ACTIVATIONS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.output_bound is not None and not self.output_bound > 0.0:
            raise ValueError(f"output_bound must be above 0, or None for no bound, got {self.output_bound}")


class RewardModel(nn.Module):
    """A reward on pooled hidden states, with the statistics to serve it normalised.

    `forward` is the raw reward, for reward losses. `serve` is what the policy is trained on.

    Args:
        config: see RewardModelConfig.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        features = config.hidden_size * len(pooling_kinds(config.pooling))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        layers: list[nn.Module] = [nn.LayerNorm(features)] if config.layer_norm else []
        width = features
        for size in config.hidden_sizes:
            layers += [nn.Linear(width, size), _ACTIVATIONS[config.activation]()]
            if config.dropout > 0.0:
                layers.append(nn.Dropout(config.dropout))
            width = size
        layers.append(nn.Linear(width, 1, bias=config.bias))
        self.network = nn.Sequential(*layers)
        self.normalizer = RewardNormalizer()

    def features(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Pooled and standardised features [B, F], what the network reads.

        Raises:
            ValueError: hidden states of another width than the configuration's.
        """
        if hidden_states.dim() == 3 and hidden_states.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states have width {hidden_states.shape[2]}, the reward model was made for "
                f"{self.config.hidden_size}: use hidden states of the model it was trained on"
            )
        pooled = pool(hidden_states, mask, self.config.pooling)
        return (pooled.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Raw rewards.

        Args:
            hidden_states: [B, S, H].
            mask: [B, S] bool, the positions to pool over, for example `Sequences.response_mask`.

        Returns:
            [B] float32 (float64 for a float64 model). Positions outside the mask are not read.
        """
        reward = self.network(self.features(hidden_states, mask))[:, 0]
        if reward.dtype != torch.float64:
            reward = reward.float()
        bound = self.config.output_bound
        return reward if bound is None else bound * torch.tanh(reward / bound)

    @torch.no_grad()
    def serve(self, hidden_states: Tensor, mask: Tensor, *, update: bool = False) -> Tensor:
        """Rewards for the policy: raw rewards, normalised by the running statistics, dropout off, without gradient.

        Args:
            hidden_states, mask: as for `forward`.
            update: first take these rewards into the statistics. A trainer does, a server that only answers does not.

        Returns:
            [B], as from `forward`.
        """
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            rewards = self(hidden_states, mask)
        finally:
            for module in training:
                module.training = True
        if update:
            self.normalizer.update(rewards)
        return self.normalizer.normalize(rewards)

    @torch.no_grad()
    def fit_feature_scale(self, hidden_states: Tensor, mask: Tensor) -> None:
        """Set the mean and standard deviation that the pooled features are brought to 0 and 1 by.

        A language model's hidden states differ in scale by orders of magnitude between features; without this a few of
        them carry the reward. The statistics are saved with the model. A feature that never varies is only centred.
        Rows with an empty mask are left out.

        Raises:
            ValueError: fewer than two rows, or a feature that is not finite.
        """
        rows = mask.any(1)
        pooled = pool(hidden_states[rows], mask[rows], self.config.pooling).double()
        if pooled.shape[0] < 2:
            raise ValueError(f"fit_feature_scale needs at least 2 rows with a non-empty mask, got {pooled.shape[0]}")
        if not bool(pooled.isfinite().all()):
            row, feature = (~pooled.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"pooled feature {feature} of row {row} is not finite: check the hidden states")
        std, mean = torch.std_mean(pooled, dim=0, correction=0)
        # Below this, rounding of the hidden states is all that varies.
        constant = std <= 1e-6 * mean.abs()
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.masked_fill(constant | (std == 0), 1.0))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `model.safetensors` and `config.json`; see irlfast.rewards.storage."""
        from .storage import save_reward_model

        save_reward_model(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RewardModel:
        """Read what `save_pretrained` wrote; see irlfast.rewards.storage."""
        from .storage import load_reward_model

        return load_reward_model(directory)
