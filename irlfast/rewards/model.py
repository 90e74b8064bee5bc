"""A reward for a response: a small network on pooled hidden states of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Reads
from .head import HeadConfig, PooledRewardModel, require_positive_int


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(HeadConfig):
    """The shape of a RewardModel: HeadConfig, and the width of what it reads.

    Args:
        hidden_size: H, the width of the hidden states it reads.

    Raises:
        ValueError: a value out of its range.
    """

    hidden_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("hidden_size", self.hidden_size)


class RewardModel(PooledRewardModel):
    """An MLP, or a linear map, on pooled hidden states.

    Args:
        config: see RewardModelConfig.
    """

    model_type: ClassVar[str] = "mlp"
    reads: ClassVar[Reads] = "hidden_states"
    config_class = RewardModelConfig
    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config, config.hidden_size)

    def states(self, hidden_states: Tensor, mask: Tensor, context_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states and mask as they are.

        Args:
            hidden_states: [B, S, H].
            mask: [B, S] bool, the positions to pool over, for example `Sequences.response_mask`.
            context_mask: not looked at; there so that all models on hidden states are called alike.

        Raises:
            ValueError: hidden states of another width than the configuration's.
        """
        check_width(hidden_states, self.config.hidden_size)
        return hidden_states, mask


def check_width(hidden_states: Tensor, hidden_size: int) -> None:
    """Raise ``ValueError`` where hidden states [B, S, H] have another width than a reward model was made for."""
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 3:
        given = list(hidden_states.shape) if isinstance(hidden_states, torch.Tensor) else type(hidden_states).__name__
        raise ValueError(f"hidden_states must have shape [B, S, H], got {given}")
    if hidden_states.shape[2] != hidden_size:
        raise ValueError(
            f"hidden_states have width {hidden_states.shape[2]}, the reward model was made for {hidden_size}: use "
            "hidden states of the model it was trained on"
        )
