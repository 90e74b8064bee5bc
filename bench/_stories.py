"""Max-ent, AIRL and GAIL under three policy updates, on a real language model and real stories.

    python -m bench._stories --data ../shared/data --seeds 0 1 --out docs/results/objectives_stories.jsonl

The model is stories260K, the demonstrations are continuations of TinyStories (the first 32 tokens are the prompt), 128
stories are held out; which ones, the order and every draw depend on the seed. Shorter than `irlfast bilevel`'s own run
in everything, so that eighteen of them fit on one core. A row is added to the file as soon as its run ends, and a row
that is there is not run again. `--table` prints the file's table and runs nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irlfast.data import load_demonstrations, split, tokenize_demonstrations
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig
from irlfast.train.log import read_log
from irlfast.train.seeds import derive_seed

from ._objectives import BETA, OBJECTIVES, UPDATES, read, table

HELDOUT, PROMPT_TOKENS, NEW_TOKENS = 128, 32, 32
COLUMNS = {
    "held-out AUC at the start": ("auc_start", "{:.3f}"),
    "at the end": ("reward_auc", "{:.3f}"),
    "log-prob of a real token at the start": ("logprob_start", "{:.3f}"),
    "after training": ("expert_token_logprob", "{:.3f}"),
    "KL, nats a response": ("kl", "{:.2f}"),
}


def configuration(seed: int, objective: str, update: str, iterations: int) -> BiLevelConfig:
    """Small steps; KL to the start model; the reward warmed up first."""
    policy = PolicyConfig(kind="ppo", epochs=2, minibatches=2, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=4))
    reward = RewardConfig(objective=objective, optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1))
    return BiLevelConfig(
        iterations=iterations,
        reward_warmup_steps=16,
        prompts_per_step=16,
        eval_every=max(1, iterations),
        eval_prompts=HELDOUT,
        checkpoint_every=max(1, iterations),
        beta=BETA[objective],
        seed=seed,
        rollout=SamplingParams(max_new_tokens=NEW_TOKENS, n=4),
        policy=replace(policy, **UPDATES[update]),
        reward=replace(reward, **OBJECTIVES[objective]),
    )


class Start:
    """What the runs of a seed share: the model, its tokenizer, and the split stories."""

    def __init__(self, data: Path, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = data / "models" / "stories260K"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = load_demonstrations(data / "text" / "tinystories_1000.jsonl.gz")
        parts = split(rows, heldout_count=HELDOUT, seed=derive_seed(seed, "held-out rows", 0))
        tokenized = [
            tokenize_demonstrations(part, self.tokenizer, max_response_tokens=NEW_TOKENS, prompt_tokens=PROMPT_TOKENS)
            for part in parts
        ]
        unseen = {row.prompt_ids for row in tokenized[1]}
        self.demonstrations = [row for row in tokenized[0] if row.prompt_ids not in unseen]
        self.heldout = tokenized[1]

    def trainer(self, config: BiLevelConfig, out: Path) -> BiLevelTrainer:
        """A trainer whose policy is a copy of the model, and whose reward reads the model."""
        torch.manual_seed(derive_seed(config.seed, "reward", 0))
        policy = copy.deepcopy(self.model).requires_grad_(True)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        pad = eos if pad is None else pad
        trainer = BiLevelTrainer(
            policy=policy,
            engine=TransformersEngine(policy, eos_token_id=eos, pad_token_id=pad),
            reward=RewardModel(
                RewardModelConfig(
                    hidden_size=policy.config.hidden_size + 2,
                    pooling=("mean", "max"),
                    hidden_sizes=(128,),
                    output_bound=10.0,
                )
            ),
            demonstrations=self.demonstrations,
            heldout=self.heldout,
            config=config,
            pad_token_id=pad,
            out=out,
            reference=self.model,
        )
        trainer.fit_reward_scale()
        return trainer


def run(start: Start, seed: int, objective: str, update: str, iterations: int) -> dict[str, Any]:
    """One run's row."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        trainer = start.trainer(configuration(seed, objective, update, iterations), Path(out))
        trainer.train()
        first, *_, last = read_log(Path(out) / "metrics.jsonl", "eval")
    kept = ("reward_auc", "expert_token_logprob", "kl", "repetition", "length", "reward_expert", "reward_sample")
    return {
        "seed": seed,
        "objective": objective,
        "update": update,
        "iterations": iterations,
        "beta": trainer.config.beta,
        "auc_start": first["reward_auc"],
        "logprob_start": first["expert_token_logprob"],
        **{name: last[name] for name in kept},
        "heldout_prompts": len(trainer.heldout),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/results/objectives_stories.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of --out and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            done = read(arguments.out) if arguments.out.exists() else []
            known = {(row["seed"], row["objective"], row["update"]) for row in done}
            start = Start(arguments.data, seed)
            for update in UPDATES:
                for objective in OBJECTIVES:
                    if (seed, objective, update) in known:
                        continue
                    row = run(start, seed, objective, update, arguments.iterations)
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    print("\n".join(table(read(arguments.out), COLUMNS)))


if __name__ == "__main__":
    main()
