"""One of two processes whose trainers share a reward: `trl_ranks.py RANK FOLDER POLICY`; see test_trl_ranks.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from irlfast.data import TokenizedDemonstration
from irlfast.integrations.trl import OnlineReward, OnlineRewardConfig
from irlfast.rewards import create_reward_model
from irlfast.train import OptimizerConfig, RewardConfig

DEMONSTRATIONS = [
    TokenizedDemonstration(prompt_ids=(3 + i,), response_ids=(4 + i, 5 + i, 2), truncated=False) for i in range(4)
]
ARGS = SimpleNamespace(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=None,
    repetition_penalty=1.0,
    generation_kwargs=None,
    fsdp="",
    device="cpu",
)


def call(step: int, prompts: range) -> dict[str, Any]:
    """Two completions to each prompt, of two tokens and EOS."""
    rows = [(prompt, copy) for prompt in prompts for copy in range(2)]
    ids = [[3 + (5 * prompt + 3 * copy + step) % 13, 3 + (prompt + copy + 2 * step) % 13, 2] for prompt, copy in rows]
    return {
        "prompts": [f"w{prompt}" for prompt, _ in rows],
        "completions": [f"w{a - 3} w{b - 3}" for a, b, _ in ids],
        "completion_ids": ids,
    }


def make(policy_folder: Path, *, seed: int, fit: bool) -> OnlineReward:
    torch.manual_seed(seed)
    config = OnlineRewardConfig(
        fit_feature_scale=fit, reward=RewardConfig(objective="gail", replay=2, optimizer=OptimizerConfig(lr=0.02))
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_folder) for _ in range(2))
    reward = create_reward_model({"hidden_size": 34, "hidden_sizes": (8,), "pooling": "mean"})
    online = OnlineReward(reward, DEMONSTRATIONS, reference=reference, config=config)
    online.bind(policy.train(), AutoTokenizer.from_pretrained(policy_folder), ARGS)
    return online


def train(online: OnlineReward, prompts: range, steps: range) -> list[float]:
    given: list[float] = []
    for step in steps:
        given += online(**call(step, prompts))
        online.end_step(step)
    return given


def main(rank: int, folder: Path, policy_folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    own = range(2 * rank, 2 * rank + 2)
    for fit in (True, False):
        online = make(policy_folder, seed=rank, fit=fit)  # begins as another reward on each rank
        online.begin(0, 4, folder)
        given = train(online, own, range(1, 4))
        online.save(folder / f"saved-{fit}")
        distributed.barrier()
        given += train(online, own, range(4, 5))
        found[str(fit)] = {"given": given, "reward": online.reward.state_dict()}
    again = make(policy_folder, seed=7, fit=True)
    again.begin(3, 4, folder / "saved-True")
    train(again, own, range(4, 5))
    found["again"] = {"reward": again.reward.state_dict()}
    torch.save(found, folder / f"found-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
