"""The run that is measured: bi-level IRL of a small language model on real stories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from irlfast.commands.bilevel import BiLevelCommand, DataConfig
from irlfast.commands.engines import EngineConfig
from irlfast.rollout import SamplingParams, SGLangOptions
from irlfast.train import BiLevelConfig, OptimizerConfig, PolicyConfig, RewardConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the model, the data and SGLang are."""

    model: str
    """Folder of the language model."""
    demonstrations: str
    """File of stories."""
    sglang: SGLangOptions
    """How to start the server."""


def command(
    setting: Setting, engine: Literal["transformers", "sglang"], seed: int, out: Path, iterations: int
) -> BiLevelCommand:
    """The options of `irlfast bilevel` for one run; the same but for what samples."""
    return BiLevelCommand(
        model=setting.model,
        demonstrations=setting.demonstrations,
        out=out,
        supervised_baseline=False,
        data=DataConfig(heldout=128),
        sampler=EngineConfig(engine=engine, sglang=setting.sglang),
        train=BiLevelConfig(
            iterations=iterations,
            reward_warmup_steps=10,
            prompts_per_step=16,
            eval_every=iterations,
            eval_prompts=128,
            checkpoint_every=iterations,
            seed=seed,
            rollout=SamplingParams(max_new_tokens=48, n=6),
            policy=PolicyConfig(kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=3e-4, warmup_steps=5)),
            reward=RewardConfig(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)),
        ),
    )


def with_overlap(run: BiLevelCommand, overlap: int, epochs: int) -> BiLevelCommand:
    """The same run, sampling ahead, with more or less training for each batch."""
    policy = replace(run.train.policy, epochs=epochs)
    return replace(run, train=replace(run.train, overlap=overlap, policy=policy))
