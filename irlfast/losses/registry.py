"""Reward objectives by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from .airl import AirlObjective
from .bradley_terry import BradleyTerryObjective
from .contrastive import ContrastiveObjective
from .gail import GailObjective
from .max_margin import MaxMarginObjective
from .maxent import MaxEntropyIRLObjective
from .objective import Objective
from .spin import SpinObjective
from .weighted import WeightedObjective

T = TypeVar("T", bound=type[Objective])

OBJECTIVES: dict[str, type[Objective]] = {
    "maxent": MaxEntropyIRLObjective,
    "weighted": WeightedObjective,
    "airl": AirlObjective,
    "gail": GailObjective,
    "contrastive": ContrastiveObjective,
    "max_margin": MaxMarginObjective,
    "bradley_terry": BradleyTerryObjective,
    "spin": SpinObjective,
}


def register_objective(name: str) -> Callable[[T], T]:
    """Class decorator: make an `Objective` known by a name, to `make_objective`, RewardConfig and the command line.

    Raises:
        TypeError: not a dataclass that derives from Objective.
        ValueError: the name is taken, by another class or by this one.
    """

    def register(cls: T) -> T:
        if not (isinstance(cls, type) and issubclass(cls, Objective) and is_dataclass(cls)):
            raise TypeError(f"{cls!r} is no dataclass that derives from irlfast.losses.Objective")
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is {OBJECTIVES[name].__name__} already: choose another name")
        OBJECTIVES[name] = cls
        return cls

    return register


def objective_names() -> tuple[str, ...]:
    """Names that `make_objective` knows, in the order they were registered."""
    return tuple(OBJECTIVES)


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of that name with those options.

    Raises:
        ValueError: an unknown name or option (the message lists the known ones), or a value that is out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; known are {', '.join(OBJECTIVES)} (see register_objective)")
    cls = OBJECTIVES[name]
    known = [field.name for field in fields(cls)]
    unknown = [option for option in options or {} if option not in known]
    if unknown:
        have = ", ".join(known) or "none"
        raise ValueError(f"objective {name!r} has no option {', '.join(map(repr, unknown))}; its options: {have}")
    return cls(**(options or {}))
