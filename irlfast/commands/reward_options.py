"""``--reward-model.*``: which reward model a command trains, and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from irlfast.rewards import BaseRewardModel, ReaderConfig, create_reward_model
from irlfast.rewards.reader import lasting_name
from irlfast.train.config import require

PARTS = ("last", "mean", "max", "trajectory")


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    """The reward model: on hidden states of the frozen start model, or on a backbone of its own."""

    type: Literal["mlp", "trajectory", "multi", "ensemble", "backbone"] = "mlp"
    """mlp: a network on pooled hidden states; trajectory: a transformer over them; multi: several of these, added;
    ensemble: several mlp that may disagree; backbone: a head on a transformers model, frozen or with LoRA."""
    hidden_sizes: tuple[int, ...] = (128,)
    """Widths of the hidden layers; none makes the reward linear. (mlp, multi, ensemble, backbone)"""
    pooling: tuple[Literal["last", "mean", "max"], ...] = ("mean", "max")
    """How the states of the response's tokens become one vector; several are put side by side. (mlp, ensemble,
    backbone)"""
    dropout: float = 0.0
    """Dropout while the reward is trained."""
    output_bound: float | None = 10.0
    """Rewards stay within this bound on either side; those of tokens where the type is trajectory."""
    width: int = 64
    """Width of the transformer. (trajectory)"""
    layers: int = 2
    """Its layers. (trajectory)"""
    heads: int = 4
    """Its attention heads. (trajectory)"""
    reduction: Literal["mean", "sum", "last"] = "mean"
    """How the tokens' rewards make up the response's. (trajectory)"""
    read_prompt: bool = True
    """Let the transformer attend to the prompt. (trajectory)"""
    parts: tuple[Literal["last", "mean", "max", "trajectory"], ...] = ("last", "mean", "max")
    """Heads by what they pool, or a trajectory head; each is logged by this name. (multi)"""
    part_weights: tuple[float, ...] = ()
    """A weight for each head; none is 1 each. (multi)"""
    members: int = 4
    """Members. (ensemble)"""
    penalty: float = 0.0
    """Standard deviations over the members taken off the reward. (ensemble)"""
    backbone: str | None = None
    """Folder or hub name of the backbone, with the start model's tokenizer; none is the start model. (backbone)"""
    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """What of the backbone is trained. (backbone)"""
    lora_rank: int = 8
    """Rank of the LoRA matrices. (backbone)"""

    def __post_init__(self) -> None:
        weights = len(self.part_weights)
        require(weights in (0, len(self.parts)), "reward_model.part_weights", self.part_weights, "one weight a part")


def make_reward_model(options: RewardModelOptions, model: Any, *, token_statistics: bool) -> BaseRewardModel:
    """A new reward model for a causal language model, on its device.

    Args:
        options: which, and its shape.
        model: the language model whose states it reads, or whose tokens.
        token_statistics: whether it also reads each token's log-prob and entropy.
    """
    config = model.config.get_text_config()
    width = ReaderConfig(token_statistics=token_statistics).width(config.hidden_size)
    bounds: dict[str, Any] = {"dropout": options.dropout, "output_bound": options.output_bound}
    head = {"hidden_sizes": options.hidden_sizes, **bounds}
    trajectory = {name: getattr(options, name) for name in ("width", "layers", "heads", "reduction", "read_prompt")}
    trajectory |= {"hidden_size": width, **bounds}
    pooled = {"hidden_size": width, "pooling": options.pooling, **head}
    if options.type == "mlp":
        chosen: dict[str, Any] = pooled
    elif options.type == "trajectory":
        chosen = trajectory
    elif options.type == "ensemble":
        chosen = {"options": pooled, "members": options.members, "penalty": options.penalty}
    elif options.type == "multi":
        weights = options.part_weights or (1.0,) * len(options.parts)
        chosen = {
            "parts": [
                {"name": name, "weight": weight, "model_type": "trajectory", "options": trajectory}
                if name == "trajectory"
                else {"name": name, "weight": weight, "options": {"hidden_size": width, "pooling": name, **head}}
                for name, weight in zip(options.parts, weights, strict=True)
            ]
        }
    else:
        chosen = {
            "model": lasting_name(options.backbone or model.config.name_or_path),
            "pooling": options.pooling,
            **head,
        }
        chosen |= {"tuning": options.tuning, "lora_rank": options.lora_rank}
    return create_reward_model(chosen, options.type).to(model.device)
