"""What a bi-level checkpoint holds, written and read back as one.

policy/model.safetensors, config.json ...    loads with AutoModelForCausalLM.from_pretrained where the policy is one
reward/model.safetensors, config.json        loads with load_reward_model; the serving normaliser is inside
optimizers.pt                                both AdamW states, replayed samples, torch's generator state (weights_only)
state.json                                   iteration, data position, rollout count, the whole configuration
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import irlfast
from irlfast.rewards import load_reward_model

from .checkpoint import latest_checkpoint, write_checkpoint
from .config import config_dict

if TYPE_CHECKING:
    from .bilevel import BiLevelTrainer

# What a resumed run may change: how long it goes on and how often it looks, not what a step does.
_FREE = ("iterations", "eval_every", "checkpoint_every", "keep_checkpoints")


def save(trainer: BiLevelTrainer, folder: Path, extra: Callable[[Path], None] | None = None) -> Path:
    """Write the trainer's whole state as checkpoint `trainer.iteration` below `folder`."""

    def write(path: Path) -> None:
        save_policy(trainer.policy, path / "policy")
        if extra is not None:
            extra(path / "policy")
        trainer.reward.save_pretrained(path / "reward")
        tensors = {
            "policy_optimizer": trainer.policy_optimizer.state_dict(),
            "reward_optimizer": trainer.reward_optimizer.state_dict(),
            "replay": trainer.replay.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(tensors, path / "optimizers.pt")
        position = {
            "irlfast": irlfast.__version__,
            "iteration": trainer.iteration,
            "draw_position": trainer.draws.position,
            "rollout_count": trainer.rollout_count,
            "data_digest": trainer.data_digest,
            "config": config_dict(trainer.config),
        }
        (path / "state.json").write_text(json.dumps(position, indent=1) + "\n", encoding="utf-8")

    return write_checkpoint(folder, trainer.iteration, write, keep=trainer.config.keep_checkpoints)


def load(trainer: BiLevelTrainer, folder: Path) -> Path:
    """Restore the trainer from the newest checkpoint below `folder`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint's data differs, or its configuration in something that a step depends on.
    """
    from safetensors.torch import load_model

    path = latest_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: nothing to resume. Start without --resume, in a folder without metrics.jsonl"
        )
    position = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _require_same(position["config"], json.loads(json.dumps(config_dict(trainer.config))), path)
    if position["data_digest"] != trainer.data_digest:
        raise ValueError(f"{path} was made on other demonstrations or held-out rows: resume with the same data")
    load_model(trainer.policy, path / "policy" / "model.safetensors")
    trainer.reward.load_state_dict(load_reward_model(path / "reward").state_dict())
    tensors = torch.load(path / "optimizers.pt", weights_only=True)
    trainer.policy_optimizer.load_state_dict(tensors["policy_optimizer"])
    trainer.reward_optimizer.load_state_dict(tensors["reward_optimizer"])
    trainer.replay.load_state_dict(tensors["replay"])
    torch.set_rng_state(tensors["torch_rng"])
    trainer.iteration = position["iteration"]
    trainer.draws.position = position["draw_position"]
    trainer.rollout_count = position["rollout_count"]
    trainer.engine.update_weights(None, trainer.policy_optimizer.step_count)
    return path


def save_policy(policy: torch.nn.Module, path: Path) -> None:
    """Weights in safetensors, tied ones once, and the model's configuration beside them where it has one."""
    from safetensors.torch import save_model

    path.mkdir(parents=True)
    save_model(policy, str(path / "model.safetensors"), metadata={"format": "pt"})
    for part in ("config", "generation_config"):
        saver = getattr(getattr(policy, part, None), "save_pretrained", None)
        if saver is not None:
            saver(path)


def _require_same(saved: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    changed = [
        f"{name} was {saved_value!r}, is {given_value!r}"
        for name, saved_value, given_value in config_differences(saved, given)
        if name not in _FREE and not name.startswith("monitors.")
    ]
    if changed:
        raise ValueError(f"{path} was made with another configuration: {'; '.join(changed)}. Resume with the same one.")
    if saved["iterations"] != given["iterations"] and any(
        saved[part]["optimizer"]["schedule"] != "constant" for part in ("policy", "reward")
    ):
        raise ValueError(
            f"iterations was {saved['iterations']}, is {given['iterations']}: a schedule that ends at the last step "
            "cannot change its length; use schedule = constant for runs that may be extended"
        )


def config_differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of every option that differs."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += config_differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append((prefix + key, left, right))
    return found
