"""The critic of PPO: the return to expect from each prefix of a response, and its clipped loss.

    V_t   of the state BEFORE token t, read from the hidden state of the token before it
    L = mean_t m_t max((V_t - G_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - G_t)^2) / 2        Schulman et al. 2017

with G_t the returns of `losses.gae` under the old values. Hidden states are standardised by the first batch that the
critic saw, because those of a language model differ in scale by orders of magnitude. The last layer starts at 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.causal_lm import unwrap
from irlfast.rollout import Sequences

from .config import CriticConfig


class Critic(nn.Module):
    """A value head on hidden states: the policy's, or those of a trunk of its own.

    Args:
        policy: whose hidden states it reads, or whose copy its trunk is.
        config: see CriticConfig.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor

    def __init__(self, policy: nn.Module, config: CriticConfig) -> None:
        super().__init__()
        model = unwrap(policy)
        width = _hidden_size(model)
        parameter = next(policy.parameters())
        self.trunk: nn.Module | None = None
        if config.reads == "own":
            base = getattr(model, "base_model", model)
            self.trunk = copy.deepcopy(base).requires_grad_(True).eval()
        layers: list[nn.Module] = []
        previous = width
        for size in config.hidden_sizes:
            layers += [nn.Linear(previous, size), nn.Tanh()]
            previous = size
        last = nn.Linear(previous, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*layers, last)
        for name, value in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.full((width,), value))
        self.register_buffer("fitted", torch.tensor(False))
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.head.to(dtype)
        self.mean, self.std = self.mean.to(dtype), self.std.to(dtype)
        self.to(parameter.device)

    def states(self, sequences: Sequences, hidden: Tensor | None) -> Tensor:
        """What the head reads, [B, S, H]: the trunk's last hidden states, or the policy's, given and detached.

        Raises:
            ValueError: the policy's hidden states are needed and missing.
        """
        if self.trunk is None:
            if hidden is None:
                raise ValueError("a critic that reads the policy needs its hidden states, got None")
            return hidden.detach()
        output = self.trunk(
            input_ids=sequences.input_ids,
            attention_mask=sequences.attention_mask.long(),
            use_cache=False,
            output_hidden_states=True,
        )
        last: Tensor = output.hidden_states[-1]
        return last

    def values(self, states: Tensor) -> Tensor:
        """V of the state before each token: [B, S, H] -> [B, S]; 0 in the first column, before which there is none."""
        read = (states[:, :-1].to(self.mean.dtype) - self.mean) / self.std
        return nn.functional.pad(self.head(read)[..., 0], (1, 0))

    @torch.no_grad()
    def fit_scale(self, sequences: Sequences, states: Tensor) -> None:
        """Standardise states [B, S, H] before response tokens by this batch; a second call changes nothing."""
        if bool(self.fitted):
            return
        rows = states[:, :-1][sequences.response_mask[:, 1:]].double()
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std.masked_fill(std <= 1e-6 * mean.abs().clamp(min=1e-6), 1.0))
        self.fitted.fill_(True)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    """The module's loss over the unmasked tokens of [B, S] tensors: 0-d; 0 where no token is unmasked."""
    worst = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        worst = torch.maximum(worst, (near - returns).square())
    return 0.5 * torch.where(mask, worst, 0.0).sum() / mask.sum().clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[G - V] / Var[G] over the unmasked tokens; 0 where the returns do not vary."""
    v, g = values[mask].double(), returns[mask].double()
    spread = float(g.var(correction=0)) if len(g) else 0.0
    return 1.0 - float((g - v).var(correction=0)) / spread if spread > 0 else 0.0


def _hidden_size(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(config.hidden_size)
