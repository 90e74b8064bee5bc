"""The shaping potential h of token-form AIRL (irlfast/losses/airl.py): learned beside the reward, then left."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShapingPotential(nn.Module):
    """h(s_t), the state before token t: an MLP on the hidden state of the position before it.

    Args:
        hidden_size: H of the hidden states.
        width: of the hidden layer.
    """

    def __init__(self, hidden_size: int, width: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """hidden_states [B, S, H], mask [B, S] bool -> [B, S], 0 outside the response.

        A response follows a prompt of at least one token, so the position before it exists.
        """
        before = nn.functional.pad(hidden_states[:, :-1], (0, 0, 1, 0))
        # What the mask leaves out is not read, whatever stands there.
        before = torch.where(mask[..., None], before, 0.0).to(self.network[1].weight.dtype)  # type: ignore[arg-type]
        return self.network(before)[..., 0].masked_fill(~mask, 0.0)
