"""What a bi-level checkpoint holds, written and read back as one.

policy/model.safetensors, config.json ...    loads with AutoModelForCausalLM.from_pretrained where the policy is one
policy/adapter_model.safetensors ...         instead, with policy.lora: loads with PeftModel.from_pretrained
critic/model.safetensors                     with policy.advantage = gae
reward/model.safetensors, config.json        loads with load_reward_model; the serving normaliser is inside
optimizers.pt                                every AdamW state, replayed samples, torch's generator state (weights_only)
state.json                                   iteration, data position, rollout count, the whole configuration
ahead.pt                                     with overlap: the batches that were under way
manifest.json                                size and digest of all of these (irlfast.train.checkpoint)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import irlfast
from irlfast.rewards import load_reward_model

from .checkpoint import whole_checkpoint, write_checkpoint
from .config import config_dict
from .lora import is_lora, load_lora, save_lora
from .prefetch import Prefetch

if TYPE_CHECKING:
    from .bilevel import BiLevelTrainer
    from .optim import Optimizer

# What a resumed run may change: how long it goes on and how often it looks, not what a step does.
_FREE = ("iterations", "eval_every", "checkpoint_every", "keep_checkpoints", "early_stop.patience")


def save(trainer: BiLevelTrainer, folder: Path, extra: Callable[[Path], None] | None = None) -> Path:
    """Write the trainer's whole state as checkpoint `trainer.iteration` below `folder`."""

    def write(path: Path) -> None:
        save_policy(trainer.policy, path / "policy")
        if extra is not None:
            extra(path / "policy")
        trainer.reward.save_pretrained(path / "reward")
        if trainer.policy_update.critic is not None:
            _save_weights(trainer.policy_update.critic, path / "critic")
        states = {name: optimizer.state_dict() for name, optimizer in _optimizers(trainer).items()}
        shaping = trainer.reward_update.shaping
        further = {
            "replay": trainer.replay.state_dict(),
            "shaping": {} if shaping is None else shaping.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        torch.save({**states, **further}, path / "optimizers.pt")
        if isinstance(trainer.engine, Prefetch):
            trainer.engine.save(path / "ahead.pt")
        position = {
            "irlfast": irlfast.__version__,
            "iteration": trainer.iteration,
            "draw_position": trainer.draws.position,
            "rollout_count": trainer.rollout_count,
            "ahead": trainer.engine.pending if isinstance(trainer.engine, Prefetch) else 0,
            "undecided_evaluations": trainer.undecided_evaluations,
            "data_digest": trainer.data_digest,
            "config": config_dict(trainer.config),
        }
        (path / "state.json").write_text(json.dumps(position, indent=1) + "\n", encoding="utf-8")

    return write_checkpoint(folder, trainer.iteration, write, keep=trainer.config.keep_checkpoints)


def load(trainer: BiLevelTrainer, folder: Path) -> Path:
    """Restore the trainer from the newest whole checkpoint below `folder`; a damaged one is named in the log.

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpointError: there are, and none is whole.
        ValueError: the checkpoint's data differs, or its configuration in something that a step depends on.
    """
    from safetensors.torch import load_model

    path = whole_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder}: nothing to resume. Start without --resume, in a folder without metrics.jsonl"
        )
    position = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _require_same(position["config"], json.loads(json.dumps(config_dict(trainer.config))), path)
    if position["data_digest"] != trainer.data_digest:
        raise ValueError(f"{path} was made on other demonstrations or held-out rows: resume with the same data")
    if is_lora(trainer.policy):
        load_lora(trainer.policy, path / "policy")
    else:
        load_model(trainer.policy, path / "policy" / "model.safetensors")
    if trainer.policy_update.critic is not None:
        load_model(trainer.policy_update.critic, path / "critic" / "model.safetensors")
    trainer.reward.load_state_dict(load_reward_model(path / "reward").state_dict())
    tensors = torch.load(path / "optimizers.pt", weights_only=True)
    for name, optimizer in _optimizers(trainer).items():
        optimizer.load_state_dict(tensors[name])
    trainer.replay.load_state_dict(tensors["replay"])
    if trainer.reward_update.shaping is not None:
        trainer.reward_update.shaping.load_state_dict(tensors["shaping"])
    torch.set_rng_state(tensors["torch_rng"])
    trainer.iteration = position["iteration"]
    ahead = position.get("ahead", 0)
    trainer.draws.position = position["draw_position"] - ahead * trainer.config.prompts_per_step
    trainer.rollout_count = position["rollout_count"] - ahead
    if isinstance(trainer.engine, Prefetch):
        trainer.engine.load(path / "ahead.pt", trainer.draw_request)  # which draws them again
    trainer.undecided_evaluations = position["undecided_evaluations"]
    trainer.engine.update_weights(None, trainer.policy_optimizer.step_count)
    return path


def save_policy(policy: torch.nn.Module, path: Path) -> None:
    """Weights in safetensors, tied ones once, and the model's configuration beside them where it has one.

    Of a policy with adapters the adapters alone.
    """
    if is_lora(policy):
        save_lora(policy, path)
        return
    _save_weights(policy, path)
    for part in ("config", "generation_config"):
        saver = getattr(getattr(policy, part, None), "save_pretrained", None)
        if saver is not None:
            saver(path)


def _save_weights(module: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    path.mkdir(parents=True)
    save_model(module, str(path / "model.safetensors"), metadata={"format": "pt"})


def _optimizers(trainer: BiLevelTrainer) -> dict[str, Optimizer]:
    found = {"policy_optimizer": trainer.policy_optimizer, "reward_optimizer": trainer.reward_optimizer}
    critic = trainer.policy_update.critic_optimizer
    return found if critic is None else {**found, "critic_optimizer": critic}


def _require_same(saved: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    changed = [
        f"{name} was {saved_value!r}, is {given_value!r}"
        for name, saved_value, given_value in config_differences(saved, given)
        if name not in _FREE and not name.startswith("monitors.")
    ]
    if changed:
        raise ValueError(f"{path} was made with another configuration: {'; '.join(changed)}. Resume with the same one.")
    parts = (saved["policy"], saved["reward"], saved["policy"]["critic"])
    if saved["iterations"] != given["iterations"] and any(p["optimizer"]["schedule"] != "constant" for p in parts):
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
