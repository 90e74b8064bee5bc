"""A reward learned inside TRL's GRPOTrainer: stories260K on TinyStories, against the same run with the reward frozen.

    python -m bench.experiments.trl_online --data ../shared/data --seeds 0 1
    python -m bench.experiments.trl_online --table

Each run is added to docs/results/trl_online.json when it is done; --table writes the table of docs/trl.md from it.
Needs trl. One core is used.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast.data import load_demonstrations, split
from irlfast.integrations.trl import OnlineReward, OnlineRewardConfig, demonstrations_for_trl
from irlfast.rewards import ReaderConfig, create_reward_model, reward_inputs
from irlfast.rewards.base import evaluating
from irlfast.rollout import SamplingParams, Sequences, TransformersEngine
from irlfast.train import OptimizerConfig, RewardConfig
from irlfast.train.evaluation import evaluate_policy

RESULT = Path(__file__).parents[2] / "docs" / "results" / "trl_online.json"
SAMPLING = SamplingParams(max_new_tokens=48)
SHOWN = ("expert_token_logprob", "kl_per_token", "reward_auc", "repetition", "length")


@torch.no_grad()
def raw_rewards(reward: Any, reference: Any, sequences: Sequences) -> Tensor:
    inputs = reward_inputs(reward, reference, sequences.input_ids, sequences.attention_mask, sequences.response_mask)
    with evaluating(reward):
        rewards: Tensor = reward(*inputs)
    return rewards


def run(data: Path, *, seed: int, learns: bool, steps: int, heldout_count: int) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(data / "models" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(name) for _ in range(2))
    rows = load_demonstrations(data / "text" / "tinystories_1000.jsonl.gz")
    parts = split(rows, heldout_count=heldout_count, seed=seed)
    (demonstrations, prompts), (heldout, _) = (
        demonstrations_for_trl(part, tokenizer, max_completion_length=SAMPLING.max_new_tokens) for part in parts
    )
    torch.manual_seed(seed)
    width = ReaderConfig().width(reference.config.hidden_size)
    reward_model = create_reward_model({"hidden_size": width, "width": 32}, "trajectory")
    reward = OnlineReward(
        reward_model,
        demonstrations,
        reference=reference,
        config=OnlineRewardConfig(
            update_every=1 if learns else steps + 1,
            update_steps=2,
            warmup_steps=10 if learns else 0,
            serve="raw",  # with scale_rewards "none" and beta 1, what max-ent IRL asks of the policy
            seed=seed,
            reward=RewardConfig(optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.01)),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": 64,
            "num_generations": 8,
            "max_completion_length": SAMPLING.max_new_tokens,
            "max_steps": steps,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "beta": 1.0,
            "scale_rewards": "none",
            "seed": seed,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 10,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        trainer = trl.GRPOTrainer(
            model=policy,
            reward_funcs=reward,
            args=trl.GRPOConfig(**options),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[reward.callback],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    pad: int = tokenizer.pad_token_id
    judge = partial(raw_rewards, reward_model, reference)
    evaluate = partial(evaluate_policy, heldout=heldout, sampling=SAMPLING, pad_token_id=pad, seed=seed, reward=judge)
    results = {
        when: evaluate(
            policy=model,
            engine=TransformersEngine(model, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad),
            reference=reference,
        )
        for when, model in (("start", reference), ("end", policy))
    }
    return {
        "seed": seed,
        "reward": "learned online" if learns else "random, frozen",
        "steps": steps,
        "prompts": len(prompts),
        "heldout": len(heldout),
        "seconds": round(seconds, 1),
        "trl": trl.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one core",
        "trainer": {k: v for k, v in options.items() if k != "output_dir"},
        "evaluation": results,
        "updates": [row for row in reward.history if row["step"] in (1, 10, 20, 40, steps)],
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a run, in the order of rewards and seeds."""
    lines = [
        "| reward | seed | log-prob of real tokens: start | end | KL a token | AUC of real over start's | over end's |",
        "|---|---|---|---|---|---|---|",
    ]
    for made in sorted(runs, key=lambda made: (made["reward"], made["seed"])):
        start, end = made["evaluation"]["start"], made["evaluation"]["end"]
        cells = [
            *(f"{part['expert_token_logprob']:.3f}" for part in (start, end)),
            f"{end['kl_per_token']:.3f}",
            *(f"{part['reward_auc']:.2f}" for part in (start, end)),
        ]
        lines.append(f"| {made['reward']} | {made['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--heldout", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="train nothing, write the table of what was measured")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text(encoding="utf-8"))["runs"]))
        return
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    for seed in options.seeds:
        for learns in (True, False):
            made = run(options.data, seed=seed, learns=learns, steps=options.steps, heldout_count=options.heldout)
            runs.append(made)
            shown = {w: {k: round(e[k], 3) for k in SHOWN} for w, e in made["evaluation"].items()}
            print(seed, made["reward"], f"{made['seconds']} s", shown, flush=True)
            command = "python " + " ".join(["-m", "bench.experiments.trl_online", *sys.argv[1:]])
            options.out.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
