"""A reward that reads the whole trajectory: a small transformer over a language model's hidden states.

z = blocks(W (h - mean) / std + position),   r_t = c tanh(w . norm(z_t) / c),   r = mean_t r_t, sum_t r_t, or r_T

over the response's tokens t; attention is causal, over the prompt (where it is read) and the response. So each prefix
has its reward, and the mean or sum is made of rewards a token. Positions count the tokens that are read, from the first
one: where the padding stands, and what stands there, changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import BaseRewardModel, Reads, TokenRewards, evaluating, prefix_differences
from .head import feature_scale, require_positive_int
from .model import check_width
from .pooling import pool

REDUCTIONS = ("mean", "sum", "last")


@dataclass(frozen=True, kw_only=True)
class TrajectoryRewardConfig:
    """The shape of a TrajectoryRewardModel.

    Args:
        hidden_size: H, the width of the hidden states it reads.
        width: of the transformer.
        layers: blocks of attention and MLP.
        heads: attention heads; they share `width` equally.
        dropout: probability, in training mode, on what each block adds.
        reduction: "mean" or "sum" of the response's rewards a token, or the "last" one's.
        read_prompt: attend to the prompt too; its tokens are read and have no reward of their own.
        output_bound: keep each token's reward inside (-output_bound, output_bound); None leaves it free.

    Raises:
        ValueError: a value out of its range.
    """

    hidden_size: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    reduction: Literal["mean", "sum", "last"] = "mean"
    read_prompt: bool = True
    output_bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "width", "layers", "heads"):
            require_positive_int(name, getattr(self, name))
        if self.width % (2 * self.heads):
            raise ValueError(f"width = {self.width} must be a multiple of 2 x heads = {2 * self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction {self.reduction!r} is unknown, expected one of {REDUCTIONS}")
        if self.output_bound is not None and not self.output_bound > 0.0:
            raise ValueError(f"output_bound must be above 0, or None for no bound, got {self.output_bound}")


class TrajectoryRewardModel(BaseRewardModel):
    """A causal transformer over hidden states, with a reward at each token of the response.

    Args:
        config: see TrajectoryRewardConfig.
    """

    model_type: ClassVar[str] = "trajectory"
    reads: ClassVar[Reads] = "hidden_states"
    config_class = TrajectoryRewardConfig
    config: TrajectoryRewardConfig
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: TrajectoryRewardConfig) -> None:
        super().__init__(config)
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_std", torch.ones(config.hidden_size))
        self.project = nn.Linear(config.hidden_size, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.score = nn.Linear(config.width, 1)

    def forward(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Raw rewards.

        Args:
            hidden_states: [B, S, H].
            mask: [B, S] bool, the response's tokens.
            context_mask: [B, S] bool, prompt and response; needed where the configuration says `read_prompt`.

        Returns:
            [B] float32 (float64 for a float64 model); 0 for an empty response.
        """
        rewards = self._rewards(hidden_states, mask, context_mask)
        if self.config.reduction == "sum":
            return rewards.masked_fill(~mask, 0.0).sum(1, dtype=torch.float64).to(rewards.dtype)
        return pool(rewards[..., None], mask, self.config.reduction)[:, 0]

    @property
    def has_token_rewards(self) -> bool:
        return True

    def token_terms(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Rewards [B, S] of the response's tokens, with gradient, 0 elsewhere; for reduction = "sum" alone."""
        if self.config.reduction != "sum":
            return super().token_terms()
        return self._rewards(hidden_states, mask, context_mask).masked_fill(~mask, 0.0)

    @torch.no_grad()
    def token_rewards(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None = None) -> TokenRewards:
        """The rewards a token that the mean or sum is made of; for "last" what each changed, the first nothing."""
        with evaluating(self):
            rewards = self._rewards(hidden_states, mask, context_mask)
        if self.config.reduction != "last":
            return TokenRewards(rewards.masked_fill(~mask, 0.0), self.config.reduction)
        first = (mask & (mask.cumsum(1) == 1)).to(rewards.dtype)
        return prefix_differences(rewards, mask, (rewards * first).sum(1))

    @torch.no_grad()
    def fit_feature_scale(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None = None) -> None:
        """As BaseRewardModel.fit_feature_scale: over all positions that the model reads."""
        check_width(hidden_states, self.config.hidden_size)
        mean, std = feature_scale(hidden_states[self._read(mask, context_mask)])
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def _read(self, mask: Tensor, context_mask: Tensor | None) -> Tensor:
        """[B, S] bool, the positions that are read."""
        if not self.config.read_prompt:
            return mask
        if context_mask is None:
            raise ValueError(
                "context_mask is missing: this model reads the prompt too. Give the mask of prompt and response "
                "(Sequences.attention_mask), or make it with read_prompt=False"
            )
        return context_mask | mask

    def _rewards(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None) -> Tensor:
        """[B, S], the reward at each position; what stands outside the response means nothing."""
        check_width(hidden_states, self.config.hidden_size)
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(f"mask must have shape {list(hidden_states.shape[:2])}, got {list(mask.shape)}")
        read = self._read(mask, context_mask)
        states = hidden_states.masked_fill(~read[..., None], 0.0).to(self.feature_mean.dtype)
        states = self.project((states - self.feature_mean) / self.feature_std)
        states = states + _positions(read.cumsum(1) - 1, self.config.width).to(states.dtype)
        # A position that is not read attends to itself alone, so that no row of the softmax is empty.
        steps = torch.arange(read.shape[1], device=read.device)
        allowed = (read[:, None, :] & (steps[:, None] >= steps)) | torch.eye(
            read.shape[1], dtype=torch.bool, device=read.device
        )
        for block in self.blocks:
            states = block(states, allowed[:, None])
        rewards: Tensor = self.score(self.norm(states))[..., 0]
        if rewards.dtype != torch.float64:
            rewards = rewards.float()
        bound = self.config.output_bound
        return rewards if bound is None else bound * torch.tanh(rewards / bound)


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: TrajectoryRewardConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, allowed: Tensor) -> Tensor:
        """states [B, S, W]; allowed [B, 1, S, S] bool, who attends to whom."""
        batch, steps, width = states.shape
        parts = self.query_key_value(self.attention_norm(states)).view(batch, steps, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        states = states + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, steps, width)))
        return states + self.dropout(self.mlp(states))


def _positions(index: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, S, W] of the positions (Vaswani et al. 2017, 3.5)."""
    steps = torch.arange(width // 2, device=index.device, dtype=torch.float32)
    rates = torch.exp(steps * (-math.log(10_000.0) / (width // 2)))
    angles = index[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
