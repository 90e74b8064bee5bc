"""What of an OnlineReward is saved, and read back.

reward/                 the reward model with its normaliser: loads with load_reward_model, SavedReward, irlfast score
learning.pt             its optimiser and, for each rank, places in the demonstrations, replayed samples and generations
                        that it has not learned from yet (weights_only)
state.json              the trainer's step, counts, the configuration, the demonstrations' digest
manifest.json           size and digest of all of these (irlfast.train.checkpoint)

Random numbers are functions of the configuration's seed and these places, and torch's generator, which dropout in the
reward draws from, is saved and restored by the trainer itself.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import irlfast
from irlfast.rewards import load_reward_model
from irlfast.rollout import Rollouts, Sequences
from irlfast.train.checkpoint import verify_checkpoint, write_whole
from irlfast.train.config import config_dict
from irlfast.train.experience import Experience
from irlfast.train.state import config_differences

from .ranks import gathered_objects, rank_and_world

if TYPE_CHECKING:
    from .online import OnlineReward


def save(online: OnlineReward, folder: Path) -> None:
    """Write everything to `folder`; in several processes, called by all."""
    ranks = gathered_objects(
        {
            "experts": online.experts.state_dict(),
            "replay": online.replay.state_dict(),
            "kept": [_saved(generation.experience) for generation in online.kept],
        }
    )
    if not ranks:
        return

    def write(path: Path) -> None:
        online.reward.save_pretrained(path / "reward")
        shaping = online.learner.shaping
        torch.save(
            {
                "optimizer": online.learner.optimizer.state_dict(),
                "shaping": {} if shaping is None else shaping.state_dict(),
                "ranks": ranks,
            },
            path / "learning.pt",
        )
        header = {
            "irlfast": irlfast.__version__,
            "step": online.trainer_step,
            "fitted": online.fitted,
            "unlogged": online.unlogged,
            "data_digest": online.data_digest,
            "config": config_dict(online.config),
        }
        (path / "state.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    write_whole(folder, write)


def load(online: OnlineReward, folder: Path) -> int:
    """Take everything from `folder`; returns the trainer's step that it was saved at.

    Raises:
        FileNotFoundError: nothing is saved there.
        DamagedCheckpointError: it is not as it was written.
        ValueError: other options, demonstrations or number of processes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there, so the reward cannot go on from where the policy does. Resume from a checkpoint "
            "in args.output_dir that was saved with the reward's callback, or call reward.load(FOLDER) before train()"
        )
    verify_checkpoint(folder)
    header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    changed = config_differences(header["config"], json.loads(json.dumps(config_dict(online.config))))
    if changed:
        text = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in changed)
        raise ValueError(f"{folder} was made with another configuration: {text}. Resume with the same one")
    if header["data_digest"] != online.data_digest:
        raise ValueError(f"{folder} was made with other demonstrations: resume with the same ones, in their order")
    tensors = torch.load(folder / "learning.pt", weights_only=True)
    rank, world = rank_and_world()
    if len(tensors["ranks"]) != world:
        raise ValueError(
            f"{folder} was made by {len(tensors['ranks'])} processes, these are {world}: resume with as many"
        )
    online.reward.load_state_dict(load_reward_model(folder / "reward").state_dict())
    online.learner.optimizer.load_state_dict(tensors["optimizer"])
    if online.learner.shaping is not None:
        online.learner.shaping.load_state_dict(tensors["shaping"])
    own = tensors["ranks"][rank]
    online.experts.load_state_dict(own["experts"])
    online.replay.load_state_dict(own["replay"])
    online.fitted, online.unlogged = header["fitted"], header["unlogged"]
    online.kept.clear()
    device = next(online.reward.parameters()).device
    for saved in own["kept"]:
        samples, experts = _sequences(Rollouts, saved["samples"]), _sequences(Sequences, saved["experts"])
        logprobs = saved["logprobs"]
        online.keep(samples.to(device), experts.to(device), None if logprobs is None else logprobs.to(device))
    return int(header["step"])


def _saved(experience: Experience) -> dict[str, Any]:
    """An experience without what the frozen models say of it, which they will say again."""
    return {
        "samples": {field.name: getattr(experience.samples, field.name) for field in fields(Rollouts)},
        "experts": {field.name: getattr(experience.experts, field.name) for field in fields(Sequences)},
        "logprobs": experience.expert_token_logprobs,
    }


def _sequences(cls: Any, saved: dict[str, Any]) -> Any:
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
