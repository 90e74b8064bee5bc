"""Configuration of the trainers: frozen, keyword-only, checked when made, shown whole by ``irlfast bilevel --help``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from irlfast.losses import Objective, make_objective
from irlfast.losses.aggregation import Aggregation
from irlfast.rollout import SamplingParams

from .monitors import MonitorConfig
from .policy_kinds import RECIPES, Advantage, PolicyUpdateKind


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
    eps: float = 1e-8
    """Added to the root of the second moment."""
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
        require(self.eps > 0, "eps", self.eps, "a number above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a count of at least 0")
        require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", self.final_lr_fraction, "a share in [0, 1]")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "a norm of at least 0")


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value function of policy.advantage = gae: what return to expect after each token of a response."""

    reads: Literal["policy", "own"] = "policy"
    """policy: a value head on the policy's last hidden states, which it does not train. own: a value model of its own,
    a copy of the start policy without its output layer, trained whole."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the head's hidden layers; none makes it linear."""
    lam: float = 1.0
    """GAE's lambda. At 1 the critic is a baseline and cannot bias the policy; below, less variance and its bias."""
    clip: float | None = 0.2
    """How far from its old value a value may gain by moving, as in PPO; none for no bound."""
    whiten: bool = False
    """Bring each batch's advantages to mean 0 and standard deviation 1."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=3e-3))
    """Optimiser of the critic; it takes a step with each of the policy's."""

    def __post_init__(self) -> None:
        require(all(size >= 1 for size in self.hidden_sizes), "critic.hidden_sizes", self.hidden_sizes, "widths from 1")
        require(0 <= self.lam <= 1, "critic.lam", self.lam, "a number in [0, 1]")
        require(self.clip is None or self.clip > 0, "critic.clip", self.clip, "a range above 0, or None")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, through peft) in place of training the whole policy."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole policy."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, as in peft's target_modules; none takes every linear layer but the
    output layer."""
    dropout: float = 0.0
    """Dropout before an adapter. The policy is trained in evaluation mode, so that it is the one that sampled."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "at least 0, which trains the whole policy")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy update of bi-level IRL: maximise E[r] - beta KL(pi || ref), or E[r] + beta H(pi)."""

    kind: PolicyUpdateKind = "reinforce"
    """Policy loss and its defaults (irlfast.train.policy_kinds)."""
    advantage: Advantage | None = None
    """Baseline within the samples of one prompt (irlfast.losses.group_advantages), or gae, a critic's; none takes the
    kind's own."""
    dense_rewards: bool = False
    """Reward each token with the reward model's token_rewards instead of the response as a whole."""
    epochs: int = 1
    """Passes over the rollouts of one policy step; more than 1 needs a kind with a ratio, such as ppo."""
    minibatches: int = 1
    """Optimiser steps a pass: the rollouts are dealt into this many parts; more than 1 needs a kind with a ratio."""
    clip: tuple[float, float] | None = None
    """Lower and upper clip range of the ratio; none takes the kind's own, (0.2, 0.2) for ppo."""
    aggregation: Aggregation | None = None
    """How the loss's token terms become one number (irlfast.losses.aggregation); none takes the kind's own."""
    tis_cap: float | None = None
    """Cap of the truncated importance weights that correct for sampling at another temperature, top-p or top-k than the
    policy's own; none by default, which is right at temperature 1 without truncation."""
    icepop_band: tuple[float, float] | None = None
    """Leave out tokens whose ratio of policy to sampler lies outside (low, high), such as 0.5 5 (IcePop); none keeps
    all. With tis_cap too, what is kept is capped."""
    micro_batch_size: int = 256
    """Sequences in one forward and backward pass; gradients accumulate over them to the same step."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Value function, used with advantage = gae."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of training the whole policy."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser of the policy."""

    def __post_init__(self) -> None:
        require(self.kind in RECIPES, "policy.kind", self.kind, f"one of {tuple(RECIPES)}")
        require(self.epochs >= 1, "policy.epochs", self.epochs, "at least 1")
        require(self.minibatches >= 1, "policy.minibatches", self.minibatches, "at least 1")
        require(self.micro_batch_size >= 1, "policy.micro_batch_size", self.micro_batch_size, "at least 1")
        require(self.tis_cap is None or self.tis_cap > 0, "policy.tis_cap", self.tis_cap, "a cap above 0, or None")
        band = self.icepop_band
        require(band is None or 0 <= band[0] < 1 < band[1], "policy.icepop_band", band, "0 <= low < 1 < high, or None")
        if not RECIPES[self.kind].ratio and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"policy.epochs = {self.epochs}, policy.minibatches = {self.minibatches}: {self.kind} takes one step "
                "on each batch of rollouts; use policy.kind = 'ppo' to take more"
            )
        if self.dense_rewards and self.advantage_kind == "grpo":
            raise ValueError(
                "policy.dense_rewards with advantage grpo: one token's rewards are no group to divide by the standard "
                "deviation of; use policy.advantage = 'rloo', 'dr_grpo' or 'gae'"
            )
        if self.critic.reads == "own" and self.lora.rank:
            raise ValueError(
                "policy.critic.reads = 'own' copies the policy that policy.lora keeps one of: use reads = 'policy'"
            )

    @property
    def advantage_kind(self) -> Advantage:
        """`advantage`, or the kind's own."""
        return self.advantage or RECIPES[self.kind].advantage


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward update: an objective (irlfast.losses, docs/objectives.md), its options and what keeps it stable."""

    objective: str = "maxent"
    """What the reward is learned by: maxent, weighted, airl, gail, contrastive, max_margin, bradley_terry, spin, or a
    name that irlfast.train.register_objective was given."""
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
    gradient_penalty: float = 0.0
    """Weight of E[(|slope| - 1)^2] between pooled features of demonstrations and samples."""
    r1: float = 0.0
    """Weight of half the mean squared slope at pooled features of demonstrations."""
    replay: int = 0
    """Samples of earlier policies kept for each prompt, which join the loss under the log-prob of their own sampler."""
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
        for name in ("gradient_penalty", "r1"):
            require(getattr(self, name) >= 0, f"reward.{name}", getattr(self, name), "a weight of at least 0")
        require(self.replay >= 0, "reward.replay", self.replay, "a count of at least 0")
        if self.replay and not self.make_objective().takes_replay:
            raise ValueError(
                f"reward.replay = {self.replay}: objective {self.objective!r} with options {self.options} needs "
                "samples of one policy, the one whose log-probs it reads; set replay to 0"
            )
        self.make_objective()

    def make_objective(self) -> Objective:
        """The objective with its options, the shared ones such as weight_clip among them.

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
class EarlyStopConfig:
    """Stop where the reward no longer tells held-out demonstrations from the policy's samples: AUC near .5."""

    patience: int = 0
    """Evaluations in a row with |AUC - .5| <= band after which training stops; 0 never stops early."""
    band: float = 0.02
    """How near to .5 counts. With n held-out prompts the AUC's own standard error is about .4 / sqrt(n)."""
    after: int = 1
    """First iteration whose evaluation counts: a reward that has not learned yet has AUC .5 too."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, "early_stop.patience", self.patience, "a count of at least 0")
        require(0 < self.band < 0.5, "early_stop.band", self.band, "a distance from .5 in (0, .5)")
        require(self.after >= 1, "early_stop.after", self.after, "at least 1")


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
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    """When to stop before the last iteration."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last is always written."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    seed: int = 0
    """Every random draw is a function of this seed and of counters, so a resumed run repeats an uninterrupted one."""
    overlap: int = 0
    """Batches sampled ahead, while reward and policy train (irlfast.train.prefetch); needs an engine with weights of
    its own. 0 samples in turn with training. Above 0, policy.tis_cap is 2 where neither it nor icepop_band is given."""
    rollout: SamplingParams = field(default_factory=lambda: SamplingParams(n=8))
    """How the policy is sampled; its `n` is the group size, its `seed` is replaced for each call."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Policy update."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward update."""
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    """Where the warnings of reward hacking draw the line."""

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
        require(self.overlap >= 0, "overlap", self.overlap, "a count of at least 0")
        require(self.rollout.n >= 2, "rollout.n", self.rollout.n, "at least 2: the others are the baseline")
        temperature = self.rollout.temperature
        require(temperature > 0, "rollout.temperature", temperature, "above 0: learning needs samples")
        plain = temperature == 1 and self.rollout.top_p == 1 and self.rollout.top_k == 0
        if not plain and {"expert_logprobs", "expert_tokens"} & self.reward.make_objective().needs:
            raise ValueError(
                f"objective {self.reward.objective!r} reads the sampler's density at demonstrations, which is known "
                f"for rollout.temperature = 1, top_p = 1, top_k = 0; given are {temperature}, {self.rollout.top_p}, "
                f"{self.rollout.top_k}"
            )


def config_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for a checkpoint or a log."""
    return asdict(config)
