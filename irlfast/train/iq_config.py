"""Configuration of IQ-Learn fine-tuning: every counter is in optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import OptimizerConfig, require


@dataclass(frozen=True, kw_only=True)
class IQLearnConfig:
    """Offline imitation by IQ-Learn: L = mean (V - q) + lambda_td mean (q - gamma V')^2, and a KL where asked for."""

    gamma: float = 1.0
    """Discount of the next state's value in the reward r_t = q_t - gamma V_{t+1}."""
    lambda_td: float = 0.1
    """Weight of the squared reward, 1 / (4 alpha); 0 is maximum likelihood."""
    temperature: float = 1.0
    """Temperature tau of the soft values: V = tau logsumexp(logits / tau), log pi = (q - V) / tau."""
    use_mle: bool = True
    """Allow steps of plain maximum likelihood: those before IQ-Learn begins, or all of them without use_irl."""
    use_irl: bool = True
    """Train by IQ-Learn; without it by maximum likelihood alone."""
    mle_steps_before_irl: int = 0
    """Optimiser steps of maximum likelihood before IQ-Learn begins."""
    use_kl: bool = False
    """Add lambda_kl times the divergence KL(pi || start) of each token's distribution."""
    lambda_kl: float = 0.1
    """Weight of that divergence."""
    kl: Literal["exact", "sampled"] = "exact"
    """exact: over the whole vocabulary, on demonstrations' tokens (and on samples', where there are any). sampled: the
    ratio-corrected estimator on samples' tokens, the only ones it holds for; needs online_rate above 0."""
    online_rate: float = 0.0
    """Share of the squared reward taken over the policy's own answers to the batch's prompts; 0 is offline."""
    truncated: Literal["bootstrap", "drop"] = "bootstrap"
    """What follows the last token of a response that was cut off: the model's own value, or no reward at all."""
    lr: float = 1e-4
    """Peak learning rate."""
    eps: float = 1e-5
    """Adam's epsilon."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """adamw decays weights beside the gradient step; adam does not decay them."""
    weight_decay: float = 0.0
    """Decoupled weight decay; for adamw."""
    scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at a tenth of the peak."""
    warm_up_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    num_train_epochs: float = 1.0
    """Passes over the demonstrations; optimiser steps = epochs x demonstrations / batch, rounded, at least 1."""
    local_micro_batch_size: int = 8
    """Demonstrations in one forward and backward pass."""
    gradient_accumulation_steps: int = 4
    """Such passes in one optimiser step: a batch is their product. Tokens weigh the same however it is split."""
    local_eval_batch_size: int = 32
    """Rows in one pass of an evaluation."""
    response_length: int = 64
    """Most tokens of a response, EOS included; longer demonstrations are cut, without EOS."""
    bf16: bool = False
    """Run the model under bfloat16 autocast; weights, statistics and losses stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward, for less memory."""
    eval_every: int = 50
    """Optimiser steps between evaluations; the first and last are always evaluated."""
    eval_num_samples: int = 64
    """Held-out prompts that answers are sampled to; 0 samples none."""
    eval_samples_per_prompt: int = 4
    """Answers to each, which self-BLEU compares with one another."""
    eval_temperatures: tuple[float, ...] = (1.0,)
    """Temperatures to sample them at; 0 is greedy."""
    checkpoint_every: int = 50
    """Optimiser steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    seed: int = 0
    """Every random draw is a function of this seed and of counters, so a resumed run repeats an uninterrupted one."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "a discount in [0, 1]")
        for name in ("lambda_td", "lambda_kl", "weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        for name in ("temperature", "lr", "eps", "num_train_epochs"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        require(0 <= self.online_rate <= 1, "online_rate", self.online_rate, "a share in [0, 1]")
        for name in ("mle_steps_before_irl", "warm_up_steps", "eval_num_samples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a count of at least 0")
        for name in (
            "local_micro_batch_size",
            "gradient_accumulation_steps",
            "local_eval_batch_size",
            "response_length",
            "eval_every",
            "eval_samples_per_prompt",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for value in self.eval_temperatures:
            require(value >= 0, "eval_temperatures", self.eval_temperatures, "numbers of at least 0 (0 is greedy)")
        if not (self.use_mle or self.use_irl):
            raise ValueError("use_mle and use_irl are both off: nothing is trained; turn one of them on")
        if self.mle_steps_before_irl and not (self.use_mle and self.use_irl):
            raise ValueError(
                f"mle_steps_before_irl = {self.mle_steps_before_irl} needs use_mle and use_irl: they are steps of the "
                "first before the second begins"
            )
        if self.use_kl and self.kl == "sampled" and self.online_rate == 0:
            raise ValueError(
                "kl = 'sampled' needs samples of the policy: set online_rate above 0, or kl = 'exact'. On "
                "demonstrations' tokens the estimator would be the likelihood again"
            )
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay = {self.weight_decay} with optimizer = 'adam': use 'adamw', which has it")

    @property
    def batch_size(self) -> int:
        """Demonstrations in one optimiser step."""
        return self.local_micro_batch_size * self.gradient_accumulation_steps

    def total_steps(self, demonstrations: int) -> int:
        """Optimiser steps of a run over so many demonstrations."""
        return max(1, round(self.num_train_epochs * demonstrations / self.batch_size))

    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(
            lr=self.lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
            warmup_steps=self.warm_up_steps,
            schedule=self.scheduler,
            max_grad_norm=self.max_grad_norm,
        )
