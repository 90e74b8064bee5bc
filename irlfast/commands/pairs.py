"""``irlfast pairs``: answers of a tuned model and of its base to the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from irlfast.data import load_demonstrations, tokenize_demonstrations
from irlfast.data.preference_rows import BASE, TUNED
from irlfast.rewards import load_text_reward
from irlfast.rollout import SamplingParams
from irlfast.train.config import require
from irlfast.train.sampled_pairs import distinct_prompts, sample_pairs, write_rows

from .language_model import load_language_model


@dataclass(frozen=True, kw_only=True)
class PairsCommand:
    """Sample a tuned model and its base on the same prompts, and write {prompt, response, source, prompt_id, split}."""

    base: str
    """Folder or hub name of the model before tuning."""
    tuned: str
    """Folder or hub name of the model after it (a checkpoint's policy/, for instance)."""
    prompts: Path
    """JSON lines (.gz too) with {"prompt", "response"}, {"messages"} or {"text"} rows; their responses are not used."""
    out: Path = Path("runs/pairs.jsonl")
    """File of JSON lines to write."""
    reward: str | None = None
    """A ground truth, package.module.function or a classifier's folder; its score is written beside each answer."""
    prompt_tokens: int = 32
    """Prompt length of plain text, in tokens, BOS included."""
    max_prompts: int | None = 1000
    """Use so many different prompts at most."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of prompts for train, validation and test."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64, n=2))
    """How both models are sampled; `n` answers of each to a prompt."""
    batch_size: int = 64
    """Prompts sampled at a time."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    seed: int = 0
    """Seed of the sampling and the split."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.max_prompts is None or self.max_prompts >= 3, "max_prompts", self.max_prompts, "at least 3")


def run_pairs(command: PairsCommand) -> int:
    """Sample and write; the file appears when it is whole."""
    if command.out.exists():
        raise FileExistsError(f"{command.out} exists: choose another --out")
    score = load_text_reward(command.reward) if command.reward is not None else None
    base = load_language_model(command.base, device=command.device)
    tuned = load_language_model(command.tuned, device=command.device)
    rows = tokenize_demonstrations(
        load_demonstrations(command.prompts),
        base.tokenizer,
        max_response_tokens=command.sampling.max_new_tokens,
        prompt_tokens=command.prompt_tokens,
    )
    prompts = distinct_prompts(rows, base.tokenizer, command.max_prompts)
    found = sample_pairs(
        prompts,
        {TUNED: tuned.engine(), BASE: base.engine()},
        base.tokenizer,
        command.sampling,
        fractions=command.fractions,
        seed=command.seed,
        score=score,
        batch_size=command.batch_size,
    )
    count = write_rows(command.out, found)
    print(f"{count} answers to {len(prompts)} prompts are in {command.out}")
    return 0
