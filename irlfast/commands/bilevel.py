"""``irlfast bilevel``: bi-level IRL of a transformers language model on a file of demonstrations."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from irlfast.data import TokenizedDemonstration, token_pieces
from irlfast.report import plot_curves, print_comparison, write_json
from irlfast.reporting import write_report
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig
from irlfast.train.evaluation import evaluate_policy
from irlfast.train.log import read_log
from irlfast.train.seeds import derive_seed
from irlfast.train.supervised import SupervisedConfig, train_supervised

from .engines import EngineConfig
from .language_model import load_language_model
from .reward_options import RewardModelOptions, make_reward_model
from .rows import DataConfig, read_rows


def _default_training() -> BiLevelConfig:
    return BiLevelConfig(
        iterations=100,
        reward_warmup_steps=40,
        prompts_per_step=32,
        eval_every=20,
        eval_prompts=128,
        checkpoint_every=20,
        rollout=SamplingParams(max_new_tokens=64, n=8),
        policy=PolicyConfig(kind="ppo", minibatches=2, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=10)),
        reward=RewardConfig(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)),
    )


@dataclass(frozen=True, kw_only=True)
class BiLevelCommand:
    """Learn a reward from demonstrations while a language model is trained on it."""

    model: str
    """Folder or hub name of a causal language model; it is the start of the policy and its KL reference."""
    demonstrations: str
    """JSON lines (.gz too) with {"prompt", "response"}, {"messages"} or {"text"} rows, or a dataset's hub name."""
    out: Path = Path("runs/bilevel")
    """Folder for metrics.jsonl, samples.jsonl, summary.json, report.html, curves.png and checkpoints/."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and arithmetic of the language model; statistics and losses are float32 either way."""
    supervised_baseline: bool = True
    """Fine-tune a copy on the same demonstrations too, and set its figures beside those of IRL."""
    supervised: SupervisedConfig = field(
        default_factory=lambda: SupervisedConfig(optimizer=OptimizerConfig(lr=3e-4, warmup_steps=10))
    )
    """That supervised fine-tuning."""
    data: DataConfig = field(default_factory=DataConfig)
    """Reading of the demonstrations."""
    sampler: Annotated[EngineConfig, tyro.conf.arg(name="rollout")] = field(default_factory=EngineConfig)
    """What samples."""
    reward_model: RewardModelOptions = field(default_factory=RewardModelOptions)
    """Reward model."""
    train: Annotated[BiLevelConfig, tyro.conf.arg(name="")] = field(default_factory=_default_training)
    """Training."""


class Prepared(NamedTuple):
    """A run that can begin: its trainer, and the rows to learn from and to stop by."""

    trainer: BiLevelTrainer
    training: Sequence[TokenizedDemonstration]
    validation: Sequence[TokenizedDemonstration]


def prepare(command: BiLevelCommand) -> Prepared:
    """Load model and rows, and make the trainer; a server that samples is started or attached to. Close its engine."""
    loaded = load_language_model(command.model, device=command.device, dtype=command.dtype)
    model, tokenizer, limit = loaded.model, loaded.tokenizer, command.train.rollout.max_new_tokens
    training, validation, heldout = read_rows(
        command.demonstrations, command.data, tokenizer, max_response_tokens=limit, seed=command.train.seed
    )
    torch.manual_seed(derive_seed(command.train.seed, "models", 0))
    # With adapters the policy's own base is the reference, and there is no copy.
    reference = None if command.train.policy.lora.rank else copy.deepcopy(model)
    trainer = BiLevelTrainer(
        policy=model,
        engine=command.sampler.make(loaded, command.model),
        reward=make_reward_model(command.reward_model, model, token_statistics=command.train.reward.token_statistics),
        demonstrations=[*training, *validation],
        heldout=heldout,
        config=command.train,
        pad_token_id=loaded.pad_token_id,
        out=command.out,
        reference=reference,
        decode=lambda ids: token_pieces(ids, tokenizer),
        extra_state=tokenizer.save_pretrained,
    )
    return Prepared(trainer, training, validation)


def run_bilevel(command: BiLevelCommand) -> int:
    """Train, evaluate, compare with supervised fine-tuning, and write the results below `command.out`."""
    logging.basicConfig(level=logging.WARNING, format="irlfast: %(message)s")
    if not command.resume and (command.out / "metrics.jsonl").exists():
        raise FileExistsError(f"{command.out} holds an earlier run: choose another --out, or --resume that one")
    trainer, training, validation = prepare(command)
    try:
        command.out.mkdir(parents=True, exist_ok=True)
        write_json(command.out / "config.json", json.loads(json.dumps(asdict(command), default=str)))
        if command.resume:
            trainer.resume()
        else:
            trainer.engine.update_weights(None, 0)  # a server that runs already may hold any weights
            trainer.fit_reward_scale()
        trainer.train()
    finally:
        trainer.engine.close()

    results = read_log(command.out / "metrics.jsonl", "eval")
    columns = {"start": results[0], "bi-level IRL": results[-1]}
    if command.supervised_baseline:
        columns["supervised"] = _supervised(command, trainer, training, validation)
    summary = {name: {k: v for k, v in row.items() if k not in ("kind", "iteration")} for name, row in columns.items()}
    write_json(command.out / "summary.json", summary)
    plot_curves(command.out / "metrics.jsonl", command.out / "curves.png")
    write_report(command.out, command.out / "report.html")
    print_comparison(summary)
    print(f"Results are in {command.out}")
    return 0


def _supervised(
    command: BiLevelCommand,
    trainer: BiLevelTrainer,
    training: Sequence[TokenizedDemonstration],
    validation: Sequence[TokenizedDemonstration],
) -> dict[str, float]:
    """Fine-tune the start model, loaded again, on the same rows; the same prompts and the same reward judge it."""
    tuned = load_language_model(command.model, device=command.device, dtype=command.dtype)
    result = train_supervised(
        tuned.model, training, command.supervised, pad_token_id=trainer.pad_token_id, heldout=validation
    )
    metrics = evaluate_policy(
        policy=tuned.model,
        engine=tuned.engine(),
        heldout=trainer.heldout,
        sampling=command.train.rollout,
        pad_token_id=trainer.pad_token_id,
        seed=derive_seed(command.train.seed, "evaluation", 0),
        reward=trainer.judge,
        reference=trainer.reference,
    )
    return {**metrics, "steps": result.steps}
