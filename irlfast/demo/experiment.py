"""The demonstration's experiment: one language model that knows right workings, and three ways to make it prefer them.

Nothing but right workings of other prompts says what is wanted. From the same start, supervised fine-tuning imitates
them and bi-level IRL learns a reward from them; both are then sampled on prompts that neither has seen.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irlfast.data import TokenizedDemonstration
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import Rollouts, SamplingParams, Sequences, TransformersEngine
from irlfast.train import (
    BiLevelConfig,
    BiLevelTrainer,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    SupervisedConfig,
    train_supervised,
)
from irlfast.train.evaluation import response_tokens
from irlfast.train.seeds import derive_seed

from . import arithmetic

PRETRAINING_PROBLEMS, DEMONSTRATIONS, VALIDATION, HELDOUT = 1200, 128, 32, 400
PRETRAINING_ROWS = 40_000
REWARD_BOUND = 10.0  # nats either way; beyond that one sample's reward drowns the others' in a group's baseline


@dataclass(frozen=True, kw_only=True)
class Data:
    """Four sets of problems that share no prompt."""

    text: list[TokenizedDemonstration]
    demonstrations: list[TokenizedDemonstration]
    validation: list[TokenizedDemonstration]
    heldout_problems: list[arithmetic.Problem]
    heldout: list[TokenizedDemonstration]


def make_data(seed: int) -> Data:
    """Training text of mixed quality, right workings as demonstrations, and held-out problems."""
    rng = random.Random(derive_seed(seed, "demo data", 0))
    problems = arithmetic.all_problems()
    rng.shuffle(problems)
    parts = []
    for size in (PRETRAINING_PROBLEMS, DEMONSTRATIONS, VALIDATION, HELDOUT):
        parts.append(problems[:size])
        problems = problems[size:]
    text, demonstrations, validation, heldout = parts
    right = [[arithmetic.row(p, p.right_working) for p in part] for part in (demonstrations, validation, heldout)]
    return Data(
        text=arithmetic.mixed_text(text, PRETRAINING_ROWS, rng),
        demonstrations=right[0],
        validation=right[1],
        heldout_problems=heldout,
        heldout=right[2],
    )


def make_model() -> torch.nn.Module:
    """A two-layer Llama of about 110,000 parameters over 27 tokens, untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arithmetic.VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            bos_token_id=arithmetic.BOS,
            eos_token_id=arithmetic.EOS,
            pad_token_id=arithmetic.PAD,
        )
    )


def pretrain(data: Data, seed: int, on_step: Callable[[int], None] | None = None) -> torch.nn.Module:
    """The base model: trained on text by careful and sloppy writers."""
    torch.manual_seed(derive_seed(seed, "demo model", 0))
    model = make_model()
    train_supervised(model, data.text, PRETRAINING, pad_token_id=arithmetic.PAD, on_step=on_step)
    return model


PRETRAINING = SupervisedConfig(
    steps=1500,
    batch_size=64,
    optimizer=OptimizerConfig(
        lr=6e-3, warmup_steps=100, schedule="linear", final_lr_fraction=0.05, betas=(0.9, 0.98), weight_decay=0.01
    ),
)

FINE_TUNING = SupervisedConfig(
    steps=320, batch_size=32, eval_every=10, optimizer=OptimizerConfig(lr=3e-4, warmup_steps=10)
)


def bilevel_config(seed: int) -> BiLevelConfig:
    """PPO against the policy it started from; a reward warmed up first, so that the policy's first steps have one."""
    return BiLevelConfig(
        iterations=120,
        reward_warmup_steps=60,
        prompts_per_step=32,
        eval_every=20,
        eval_prompts=HELDOUT,
        checkpoint_every=40,
        seed=seed,
        rollout=SamplingParams(max_new_tokens=arithmetic.MAX_RESPONSE, n=8),
        policy=PolicyConfig(
            kind="ppo", epochs=2, minibatches=4, optimizer=OptimizerConfig(lr=5e-4, warmup_steps=5, schedule="linear")
        ),
        reward=RewardConfig(optimizer=OptimizerConfig(lr=5e-3, weight_decay=0.01, schedule="linear")),
    )


def make_engine(model: torch.nn.Module) -> TransformersEngine:
    return TransformersEngine(model, eos_token_id=arithmetic.EOS, pad_token_id=arithmetic.PAD)


def accuracy(model: torch.nn.Module, data: Data, seed: int, *, temperature: float = 1.0) -> float:
    """Share of held-out prompts answered by the right working, one sample each."""
    params = SamplingParams(max_new_tokens=arithmetic.MAX_RESPONSE, temperature=temperature, seed=seed)
    samples = make_engine(model).generate([list(row.prompt_ids) for row in data.heldout], params)
    return share_right(samples, data)


def share_right(samples: Rollouts, data: Data) -> float:
    answers = response_tokens(samples)
    right = [arithmetic.is_right(p, a) for p, a in zip(data.heldout_problems, answers, strict=True)]
    return sum(right) / len(right)


def make_trainer(base: torch.nn.Module, data: Data, config: BiLevelConfig, out: Path | None) -> BiLevelTrainer:
    """Bi-level IRL from the base model; its reward reads the base model's hidden states and statistics."""
    torch.manual_seed(derive_seed(config.seed, "demo reward", 0))
    policy: Any = copy.deepcopy(base)
    hidden_size = policy.config.hidden_size + (2 if config.reward.token_statistics else 0)
    trainer = BiLevelTrainer(
        policy=policy,
        engine=make_engine(policy),
        reward=RewardModel(
            RewardModelConfig(
                hidden_size=hidden_size, pooling=("mean", "max"), hidden_sizes=(64,), output_bound=REWARD_BOUND
            )
        ),
        demonstrations=data.demonstrations,
        heldout=data.heldout,
        config=config,
        pad_token_id=arithmetic.PAD,
        out=out,
        reference=copy.deepcopy(base),
        sample_metrics=lambda samples: {"accuracy": share_right(samples, data)},
        decode=lambda ids: [arithmetic.decode([i]) for i in ids],
    )
    trainer.fit_reward_scale()
    return trainer


def reward_pair_accuracy(trainer: BiLevelTrainer, data: Data, seed: int) -> float:
    """Share of held-out prompts whose right working has a higher learned reward than a wrong one of the same prompt."""
    rng = random.Random(derive_seed(seed, "demo pairs", 0))
    prompts = [list(row.prompt_ids) for row in data.heldout]
    right = [list(row.response_ids) for row in data.heldout]
    wrong = [list(arithmetic.row(p, p.wrong_working(rng)).response_ids) for p in data.heldout_problems]
    rewards = [
        trainer.rewards(Sequences.from_token_lists(prompts, responses, arithmetic.PAD)) for responses in (right, wrong)
    ]
    return float((rewards[0] > rewards[1]).float().mean())


def fine_tune(base: torch.nn.Module, data: Data) -> torch.nn.Module:
    """The rival: maximum likelihood on the same demonstrations, stopped where the validation likelihood is best."""
    model = copy.deepcopy(base)
    train_supervised(model, data.demonstrations, FINE_TUNING, pad_token_id=arithmetic.PAD, heldout=data.validation)
    return model
