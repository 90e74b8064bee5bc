"""The run that is measured: bi-level IRL of a small language model on real stories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from irlfast.commands.bilevel import BiLevelCommand, DataConfig
from irlfast.commands.engines import EngineConfig
from irlfast.rollout import SamplingParams, SGLangEngine, SGLangOptions
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


def command(setting: Setting, url: str | None, seed: int, out: Path, iterations: int) -> BiLevelCommand:
    """The options of `irlfast bilevel` for one run; the same but for what samples: the server at `url`, or nothing."""
    return BiLevelCommand(
        model=setting.model,
        demonstrations=setting.demonstrations,
        out=out,
        supervised_baseline=False,
        data=DataConfig(heldout=96),
        sampler=EngineConfig() if url is None else EngineConfig(engine="sglang", urls=(url,), sglang=setting.sglang),
        train=BiLevelConfig(
            iterations=iterations,
            reward_warmup_steps=8,
            prompts_per_step=8,
            eval_every=iterations,
            eval_prompts=96,
            checkpoint_every=iterations,
            seed=seed,
            rollout=SamplingParams(max_new_tokens=32, n=4),
            policy=PolicyConfig(kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=3e-4, warmup_steps=5)),
            reward=RewardConfig(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)),
        ),
    )


def with_overlap(run: BiLevelCommand, overlap: int, epochs: int) -> BiLevelCommand:
    """The same run, sampling ahead, with more or less training for each batch."""
    policy = replace(run.train.policy, epochs=epochs)
    return replace(run, train=replace(run.train, overlap=overlap, policy=policy))


def start_server(setting: Setting) -> SGLangEngine:
    """A server for all runs of a measurement; `close` it at the end."""
    config = AutoConfig.from_pretrained(setting.model)
    return SGLangEngine(
        setting.model, eos_token_id=config.eos_token_id, pad_token_id=0, config=config, dtype="float32",
        options=setting.sglang,
    )  # fmt: skip
