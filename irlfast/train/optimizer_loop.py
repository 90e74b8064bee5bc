"""Bi-level IRL where somebody else trains the policy: the reward's side alone, under the names it is known by.

A system with a policy trainer of its own (slime, a script) asks a BiLevelOptimizer three things: what rollouts are
worth (`get_reward_fn`, `integrate_with_rollout`), whether it is the reward's turn (`step`), and to learn
(`update_reward_model`). What a step does is the trainer's own (`reward_update.RewardUpdate`), on hidden states that
come from outside. Where irlfast is to train the policy as well, use BiLevelTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from irlfast.rewards import BaseRewardModel, create_reward_model, pool

from .config import BiLevelConfig, OptimizerConfig, RewardConfig, require
from .irl_trainer import IRLTrainer
from .metrics import mean_rows
from .trajectories import ExpertLoader, read_rollouts, rollout_mask

_OBJECTIVES = {"max_entropy": "maxent"}


class BiLevelOptimizer:
    """Says when the reward learns, learns it, and serves it.

    Args:
        reward_model: a reward model on hidden states.
        policy_model, critic_model: kept as attributes for those who hand the optimizer around; never trained here.
        expert_dataloader: from `load_expert_demonstrations`.
        args: irl_update_ratio (policy updates for one reward update, default 1), irl_objective ("max_entropy" or a
            name of irlfast.losses, default the former), irl_objective_options (a dict), reward_model_lr (default
            1e-4), beta (default 1).
        device: where the reward is.
    """

    def __init__(
        self,
        *,
        reward_model: BaseRewardModel,
        expert_dataloader: ExpertLoader,
        args: Any = None,
        policy_model: nn.Module | None = None,
        critic_model: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.update_ratio = int(getattr(args, "irl_update_ratio", 1))
        require(self.update_ratio >= 1, "irl_update_ratio", self.update_ratio, "at least 1")
        name = getattr(args, "irl_objective", "max_entropy")
        self.reward_model = reward_model.to(device)
        self.policy_model, self.critic_model = policy_model, critic_model
        self.expert_dataloader = expert_dataloader
        self.device = torch.device(device)
        reward = RewardConfig(
            objective=_OBJECTIVES.get(name, name),
            options=dict(getattr(args, "irl_objective_options", {})),
            optimizer=OptimizerConfig(lr=float(getattr(args, "reward_model_lr", 1e-4))),
        )
        self.irl_trainer = IRLTrainer(
            self.reward_model, BiLevelConfig(beta=float(getattr(args, "beta", 1.0)), reward=reward)
        )
        self.policy_updates = 0
        self.reward_model.eval()

    def step(self) -> bool:
        """Count one policy update; whether the reward is to be updated now: after every `irl_update_ratio` of them."""
        self.policy_updates += 1
        return self.policy_updates % self.update_ratio == 0

    def update_reward_model(self, *, policy_rollouts: Any, num_epochs: int = 1) -> dict[str, float]:
        """Learn from fresh demonstrations against the rollouts; an epoch is one pass through the demonstrations.

        Args:
            policy_rollouts: `Rollouts` with hidden states; or a dict with hidden_states [K, S, H], mask [K, S] (or
                lengths [K]), and log_probs [K] or [K, S]; or a list of dicts with hidden_states [S, H], actions [S] and
                log_probs, a number or [S].
            num_epochs: passes.

        Returns:
            Means over the steps, with expert_loss = -mean reward of the demonstrations and policy_loss = mean reward of
            the rollouts.

        Raises:
            TypeError, ValueError: rollouts of another form, or without what the objective needs.
        """
        require(num_epochs >= 1, "num_epochs", num_epochs, "at least 1")
        samples, log_proposal = read_rollouts(policy_rollouts)
        samples = samples.to(self.device)
        rows: list[dict[str, float]] = []
        for _ in range(num_epochs):
            rows.extend(self.irl_trainer.step(e.to(self.device), samples, log_proposal) for e in self.expert_dataloader)
        metrics = mean_rows(rows)
        metrics["expert_loss"], metrics["policy_loss"] = -metrics["expert_reward"], metrics["sample_reward"]
        return metrics

    def get_reward_fn(self) -> Callable[..., Tensor]:
        """(hidden_states [B, S, H] or [B, H], mask [B, S] or None) -> [B], the reward as it is when it is called.

        Rewards are normalised by what was served before; those just asked for count from then on.
        """

        def reward(hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            states = hidden_states[:, None] if hidden_states.dim() == 2 else hidden_states
            real = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            return self.reward_model.serve(
                states.to(self.device), real.to(self.device), real.to(self.device), update=True
            )

        return reward

    def get_info(self) -> dict[str, int]:
        """iteration (policy updates so far), reward_updates (optimiser steps), update_ratio."""
        return {
            "iteration": self.policy_updates,
            "reward_updates": self.irl_trainer.update.optimizer.step_count,
            "update_ratio": self.update_ratio,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the reward's side: reward with its normaliser, optimiser, counts, position."""
        return {
            "reward_model": self.reward_model.state_dict(),
            "reward_optimizer": self.irl_trainer.update.optimizer.state_dict(),
            "policy_updates": self.policy_updates,
            "expert_position": self.expert_dataloader.position,
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.reward_model.load_state_dict(state["reward_model"])
        self.irl_trainer.update.optimizer.load_state_dict(state["reward_optimizer"])
        self.policy_updates = int(state["policy_updates"])
        self.expert_dataloader.position = int(state["expert_position"])
        torch.set_rng_state(state["torch_rng"])


class BiLevelTrainingLoop:
    """The loop around a BiLevelOptimizer: sample, reward, train the policy, and the reward when it is its turn.

    Args:
        bi_level_optimizer: the reward's side.
        generate: round -> a dict of rollouts, as `update_reward_model` takes them.
        train_policy: one policy update on such a dict, with its "rewards"; returns metrics or None.
        num_epochs: passes through the demonstrations in a reward update.
    """

    def __init__(
        self,
        bi_level_optimizer: BiLevelOptimizer,
        *,
        generate: Callable[[int], dict[str, Any]],
        train_policy: Callable[[dict[str, Any]], Mapping[str, float] | None],
        num_epochs: int = 1,
    ) -> None:
        self.bi_level_optimizer = bi_level_optimizer
        self._generate, self._train_policy, self._num_epochs = generate, train_policy, num_epochs

    def run(self, num_rollout: int) -> list[dict[str, float]]:
        """So many rounds, from where the optimizer stands; the metrics of each."""
        optimizer, history = self.bi_level_optimizer, []
        for _ in range(num_rollout):
            rollouts = integrate_with_rollout(optimizer, self._generate(optimizer.policy_updates))
            metrics = {f"policy/{k}": float(v) for k, v in (self._train_policy(rollouts) or {}).items()}
            if optimizer.step():
                learned = optimizer.update_reward_model(policy_rollouts=rollouts, num_epochs=self._num_epochs)
                metrics.update({f"reward/{k}": v for k, v in learned.items()})
            history.append(metrics)
        return history


def setup_bi_level_irl(
    policy_model: nn.Module | None = None,
    critic_model: nn.Module | None = None,
    expert_dataloader: ExpertLoader | None = None,
    args: Any = None,
    device: torch.device | str = "cpu",
) -> BiLevelOptimizer:
    """A BiLevelOptimizer with a new reward model.

    Args:
        policy_model, critic_model, expert_dataloader, device: as for BiLevelOptimizer.
        args: as there; and of the reward model hidden_size (by default that of the demonstrations), reward_model_type
            ("mlp" or "trajectory", default "mlp"), reward_model_hidden_size (512), reward_model_num_layers (2),
            reward_model_dropout (0.1), pooling ("last").
    """
    if expert_dataloader is None:
        raise ValueError("expert_dataloader is None: give what load_expert_demonstrations returns")
    width = expert_dataloader.rows[0].hidden_states.shape[1]
    hidden_size = int(getattr(args, "hidden_size", width))
    if hidden_size != width:
        raise ValueError(f"args.hidden_size is {hidden_size}, the demonstrations' hidden states have {width}")
    kind = getattr(args, "reward_model_type", "mlp")
    size, layers = (int(getattr(args, f"reward_model_{n}", d)) for n, d in (("hidden_size", 512), ("num_layers", 2)))
    options: dict[str, Any] = {"hidden_size": hidden_size, "dropout": float(getattr(args, "reward_model_dropout", 0.1))}
    if kind == "mlp":
        options |= {"hidden_sizes": (size,) * layers, "pooling": getattr(args, "pooling", "last")}
    return BiLevelOptimizer(
        reward_model=create_reward_model(options, kind),
        policy_model=policy_model,
        critic_model=critic_model,
        expert_dataloader=expert_dataloader,
        args=args,
        device=device,
    )


def integrate_with_rollout(
    bi_level_optimizer: BiLevelOptimizer,
    rollout_data: dict[str, Any],
    hidden_states: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    pooling: Literal["last", "mean"] | None = None,
) -> dict[str, Any]:
    """Put the learned reward of each rollout into rollout_data["rewards"], over whatever stood there.

    Args:
        bi_level_optimizer: the reward's side.
        rollout_data: hidden_states [B, S, H] and mask [B, S] or lengths [B].
        hidden_states, mask: in place of those in `rollout_data`; [B, H] states are pooled already.
        pooling: "last" (the last token of the mask) or "mean" (over the mask) before the reward model; None leaves it
            to the reward model, which pools by the mask too.

    Returns:
        The same dict.

    Raises:
        ValueError: no hidden states: without them there is nothing to reward.
    """
    states = rollout_data.get("hidden_states") if hidden_states is None else hidden_states
    if states is None:
        raise ValueError("rollout_data has no hidden_states and none were given: the reward has nothing to read")
    real = rollout_mask(rollout_data if mask is None else {"mask": mask}, states) if states.dim() == 3 else None
    if real is not None and pooling is not None:
        states, real = pool(states, real, pooling), None
    rollout_data["rewards"] = bi_level_optimizer.get_reward_fn()(states, real)
    return rollout_data
