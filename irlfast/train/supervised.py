"""Supervised fine-tuning on demonstrations: the starting point of a policy, and the honest rival of IRL.

L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t        over the response tokens of a batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration
from irlfast.rollout import Sequences

from .config import OptimizerConfig, require
from .optim import Optimizer
from .scoring import response_scores
from .seeds import EndlessDraws


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Maximum likelihood on demonstrations, with the best step by held-out likelihood kept."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Demonstrations a step."""
    eval_every: int = 10
    """Steps between held-out evaluations; without held-out rows none is made and the last step is kept."""
    seed: int = 0
    """Seed of the order of the demonstrations."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", self.steps, "a count of at least 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.eval_every >= 1, "eval_every", self.eval_every, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SupervisedResult:
    """steps: optimiser steps of the kept weights; heldout_nll: nats a token there, None without held-out rows."""

    steps: int
    train_nll: float | None
    heldout_nll: float | None


def train_supervised(
    policy: nn.Module,
    demonstrations: Sequence[TokenizedDemonstration],
    config: SupervisedConfig,
    *,
    pad_token_id: int,
    heldout: Sequence[TokenizedDemonstration] = (),
    on_step: Callable[[int], None] | None = None,
) -> SupervisedResult:
    """Fine-tune `policy` in place; with `heldout`, it ends with the weights whose held-out likelihood was best.

    Args:
        policy: causal LM, as for BiLevelTrainer.
        demonstrations: rows with prompt_ids and response_ids; prompts are never trained on.
        config: steps, batch, optimiser.
        pad_token_id: fills the right of shorter rows.
        heldout: rows that choose the step to keep (early stopping).
        on_step: called with the number of steps taken after each one.
    """
    device = next(policy.parameters()).device
    draws = EndlessDraws(list(demonstrations), config.seed, "supervised")
    optimizer = Optimizer(policy, config.optimizer, config.steps)
    best_nll, best_step, best_weights = _heldout_nll(policy, heldout, pad_token_id), 0, _copy_weights(policy, heldout)
    loss: Tensor | None = None
    for step in range(1, config.steps + 1):
        policy.train()
        batch = _batch(draws.draw(config.batch_size), pad_token_id).to(device)
        optimizer.zero_grad()
        loss = -response_scores(policy, batch).stats.logprob.sum() / batch.response_mask.sum()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step)
        if best_nll is not None and (step % config.eval_every == 0 or step == config.steps):
            nll = _heldout_nll(policy, heldout, pad_token_id)
            if nll is not None and nll < best_nll:
                best_nll, best_step, best_weights = nll, step, _copy_weights(policy, heldout)
    policy.eval()
    if best_weights is not None:
        policy.load_state_dict(best_weights)
    return SupervisedResult(
        steps=config.steps if best_nll is None else best_step,
        train_nll=None if loss is None else float(loss.detach()),
        heldout_nll=best_nll,
    )


def _batch(rows: Sequence[TokenizedDemonstration], pad_token_id: int) -> Sequences:
    prompts, responses = [list(r.prompt_ids) for r in rows], [list(r.response_ids) for r in rows]
    return Sequences.from_token_lists(prompts, responses, pad_token_id)


@torch.no_grad()
def _heldout_nll(policy: nn.Module, rows: Sequence[TokenizedDemonstration], pad_token_id: int) -> float | None:
    if not rows:
        return None
    policy.eval()
    batch = _batch(rows, pad_token_id).to(next(policy.parameters()).device)
    return -float(response_scores(policy, batch).stats.logprob.sum() / batch.response_mask.sum())


def _copy_weights(policy: nn.Module, heldout: Sequence[TokenizedDemonstration]) -> dict[str, Tensor] | None:
    return {name: value.clone() for name, value in policy.state_dict().items()} if heldout else None
