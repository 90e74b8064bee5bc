"""AdamW whose learning rate is a pure function of the step, so that a checkpoint needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) out of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    decay = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * decay)


class Optimizer:
    """AdamW over the parameters of `module` that require a gradient.

    Args:
        module: what is trained.
        config: learning rate, decay, schedule and clipping.
        total_steps: optimiser steps of the whole run, which the schedules end at.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.step_count = 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters and total_steps:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
        # AdamW takes no empty list; a frozen module, which no step will change, gets one that holds nothing.
        self._adamw = torch.optim.AdamW(
            self.parameters or [{"params": []}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> tuple[float, float]:
        """Clip, update, count. Returns the gradient norm before clipping and the learning rate used.

        Raises:
            FloatingPointError: the gradient norm is not finite; nothing was updated.
        """
        norm = float(gradient_norm(self.parameters))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {norm} at optimiser step {self.step_count}; the parameters were left as they were. "
                "Lower the learning rate, or bound the reward or its weights (reward.centre, reward.weight_clip)."
            )
        limit = self.config.max_grad_norm
        if limit > 0 and norm > limit:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)
        lr = learning_rate(self.config, self.step_count, self.total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.step_count += 1
        return norm, lr

    def state_dict(self) -> dict[str, object]:
        return {"adamw": self._adamw.state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._adamw.load_state_dict(state["adamw"])  # type: ignore[arg-type]
        self.step_count = int(state["step_count"])  # type: ignore[call-overload]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients; 0 where there is none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
