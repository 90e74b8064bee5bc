"""Configuration of the trainers: frozen, keyword-only, checked when made, shown whole by ``irlfast bilevel --help``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from irlfast.losses import Objective, make_objective
from irlfast.rollout import SamplingParams


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ``ValueError`` naming the option, its value and what was expected."""
    if not condition:
        raise ValueError(f"{name} = {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, a schedule and gradient clipping."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the running gradient moments."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; linear and cosine end at `final_lr_fraction` of the peak."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a share of the peak."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "a number above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a count of at least 0")
        require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", self.final_lr_fraction, "a share in [0, 1]")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "a norm of at least 0")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy update of bi-level IRL: maximise E[r] - beta KL(pi || ref), or E[r] + beta H(pi)."""

    kind: Literal["reinforce", "ppo"] = "reinforce"
    """Policy loss (irlfast.losses.policy_loss)."""
    advantage: Literal["rloo", "grpo"] = "rloo"
    """Baseline within the samples of one prompt (irlfast.losses.group_advantages)."""
    epochs: int = 1
    """Passes over the rollouts of one policy step; more than 1 needs kind=ppo."""
    minibatches: int = 1
    """Optimiser steps a pass: the rollouts are dealt into this many parts; more than 1 needs kind=ppo."""
    clip: tuple[float, float] = (0.2, 0.2)
    """Lower and upper clip range of the PPO ratio."""
    tis_cap: float | None = None
    """Cap of the truncated importance weights that correct for sampling at another temperature, top-p or top-k than the
    policy's own; none by default, which is right at temperature 1 without truncation."""
    micro_batch_size: int = 256
    """Sequences in one forward and backward pass; gradients accumulate over them to the same step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of the policy."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "policy.epochs", self.epochs, "at least 1")
        require(self.minibatches >= 1, "policy.minibatches", self.minibatches, "at least 1")
        require(self.micro_batch_size >= 1, "policy.micro_batch_size", self.micro_batch_size, "at least 1")
        require(self.tis_cap is None or self.tis_cap > 0, "policy.tis_cap", self.tis_cap, "a cap above 0, or None")
        if self.kind == "reinforce" and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"policy.epochs = {self.epochs}, policy.minibatches = {self.minibatches}: reinforce takes one step on "
                "each batch of rollouts; use policy.kind = 'ppo' to take more"
            )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward update: an objective (irlfast.losses, docs/objectives.md), its options and what keeps it stable."""

    objective: str = "maxent"
    """What the reward is learned by; a name that irlfast.losses.objective_names() lists, or one's own
    (irlfast.train.register_objective)."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """The objective's own options, name and value in turn (docs/objectives.md lists them)."""
    weight_clip: float | None = None
    """Bound on the log importance weight around its group's mean; none by default."""
    weight_temper: float = 1.0
    """Exponent of the importance weights: below 1 they are flatter (less variance, some bias)."""
    centre: float = 0.0
    """Weight of E[r^2], which keeps the reward's free constant and its size down."""
    label_smoothing: float = 0.0
    """Share of labels taken to be the other way round, of objectives that classify or compare."""
    token_statistics: bool = True
    """Let the reward also read each response token's log-prob and entropy under the reference."""
    micro_batch_size: int = 256
    """Sequences in one pass of the frozen reference."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3, weight_decay=0.01))
    """Optimiser of the reward."""

    def __post_init__(self) -> None:
        require(self.weight_temper > 0, "reward.weight_temper", self.weight_temper, "a number above 0")
        require(self.centre >= 0, "reward.centre", self.centre, "a number of at least 0")
        require(self.micro_batch_size >= 1, "reward.micro_batch_size", self.micro_batch_size, "at least 1")
        self.make_objective()

    def make_objective(self) -> Objective:
        """The objective with its options, the shared ones (weight_clip, weight_temper, centre, label_smoothing) among them.

        Raises:
            ValueError: an unknown objective, or an option that it does not have.
        """
        options: dict[str, Any] = dict(self.options)
        for shared in fields(self):
            if shared.name not in _SHARED_OPTIONS or getattr(self, shared.name) == shared.default:
                continue
            if shared.name in options:
                raise ValueError(f"{shared.name} stands in reward.options and in reward.{shared.name}: give one")
            options[shared.name] = getattr(self, shared.name)
        return make_objective(self.objective, options)


# Options that several objectives have: written as fields of RewardConfig, given to an objective where they are not the
# default, and refused by one that has no such option.
_SHARED_OPTIONS = ("weight_clip", "weight_temper", "centre", "label_smoothing")


@dataclass(frozen=True, kw_only=True)
class BiLevelConfig:
    """One bi-level run: in each iteration `policy_steps` policy steps, then `reward_steps` reward steps."""

    iterations: int = 100
    """Outer iterations."""
    policy_steps: int = 1
    """Policy steps an iteration; each samples fresh rollouts."""
    reward_steps: int = 1
    """Reward steps an iteration; each draws fresh demonstrations."""
    reward_warmup_steps: int = 0
    """Reward steps before the first iteration, against the initial policy."""
    prompts_per_step: int = 16
    """Prompts (each with its demonstration) drawn for a step."""
    beta: float = 1.0
    """Temperature of the maximum-entropy model p ~ base * exp(r / beta), and the weight of KL or entropy."""
    regularizer: Literal["kl", "entropy"] = "kl"
    """kl: base is the reference policy; entropy: base is uniform. One of the two makes the reward identifiable."""
    eval_every: int = 10
    """Iterations between evaluations on the held-out prompts; the first and last are always evaluated."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last is always written."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    seed: int = 0
    """Every random draw is a function of this seed and of counters, so a resumed run repeats an uninterrupted one."""
    rollout: SamplingParams = field(default_factory=lambda: SamplingParams(n=8))
    """How the policy is sampled; its `n` is the group size, its `seed` is replaced for each call."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Policy update."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward update."""

    def __post_init__(self) -> None:
        require(self.iterations >= 0, "iterations", self.iterations, "a count of at least 0")
        require(self.policy_steps >= 0, "policy_steps", self.policy_steps, "a count of at least 0")
        require(self.reward_steps >= 0, "reward_steps", self.reward_steps, "a count of at least 0")
        require(self.reward_warmup_steps >= 0, "reward_warmup_steps", self.reward_warmup_steps, "at least 0")
        require(self.prompts_per_step >= 1, "prompts_per_step", self.prompts_per_step, "at least 1")
        require(self.beta > 0, "beta", self.beta, "a number above 0: without it the reward is not identifiable")
        require(self.eval_every >= 1, "eval_every", self.eval_every, "at least 1")
        require(self.eval_prompts >= 1, "eval_prompts", self.eval_prompts, "at least 1")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        require(self.rollout.n >= 2, "rollout.n", self.rollout.n, "at least 2: the others are the baseline")
        temperature = self.rollout.temperature
        require(temperature > 0, "rollout.temperature", temperature, "above 0: learning needs samples")


def config_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for a checkpoint or a log."""
    return asdict(config)
