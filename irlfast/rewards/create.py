"""Reward models by name: "mlp", "trajectory", "multi", "ensemble" and "backbone"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from .base import BaseRewardModel

MODEL_TYPES = ("mlp", "trajectory", "multi", "ensemble", "backbone")


def model_class(model_type: str, *, where: str = "model_type") -> type[BaseRewardModel]:
    """The class of a kind of reward model.

    Raises:
        ValueError: an unknown name; `where` says where it was given.
    """
    from .backbone import BackboneRewardModel
    from .model import RewardModel
    from .multi import EnsembleRewardModel, MultiRewardModel
    from .text import TextRewardModel
    from .trajectory import TrajectoryRewardModel

    classes: tuple[type[BaseRewardModel], ...] = (
        *(RewardModel, TrajectoryRewardModel, MultiRewardModel, EnsembleRewardModel),
        BackboneRewardModel,
        TextRewardModel,
    )
    for cls in classes:
        if cls.model_type == model_type:
            return cls
    raise ValueError(f"{where}: {model_type!r} is no kind of reward model, expected one of {MODEL_TYPES}")


def make_config(cls: type[BaseRewardModel], options: Mapping[str, Any], *, where: str) -> Any:
    """The configuration of `cls` from its options.

    Raises:
        ValueError: an option that it does not have, or one that it needs and that is not given; `where` says where.
    """
    known = fields(cls.config_class)
    needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    unknown = sorted(options.keys() - {f.name for f in known})
    if unknown or any(name not in options for name in needed):
        raise ValueError(
            f"{where}: a reward model of type {cls.model_type!r} needs {', '.join(needed)}; "
            f"unknown fields {unknown}, known ones {[f.name for f in known]}"
        )
    return cls.config_class(**options)


def create_reward_model(args: Any, model_type: str = "mlp") -> BaseRewardModel:
    """A new reward model.

    Args:
        args: its options, by the names of the fields of RewardModelConfig, TrajectoryRewardConfig, MultiRewardConfig,
            EnsembleRewardConfig or BackboneRewardConfig. In a mapping every name must be one of them. Of any other
            object (a dataclass, an argparse namespace) those attributes are read and others left alone.
        model_type: "mlp", "trajectory", "multi", "ensemble" or "backbone".

    Raises:
        ValueError: an unknown type, or options that it does not have, needs, or allow.
    """
    cls = model_class(model_type)
    if isinstance(args, Mapping):
        options = dict(args)
    else:
        names = [f.name for f in fields(cls.config_class)]
        options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return cls(make_config(cls, options, where="create_reward_model"))
