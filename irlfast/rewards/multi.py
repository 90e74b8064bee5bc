"""Rewards made of several: named heads added with weights, and an ensemble that knows where it disagrees.

multi      r = sum_i w_i r_i
ensemble   r = mean_m r_m - penalty std_m r_m       (std of the population; Lakshminarayanan et al. 2017 for the
                                                     members, Coste et al. 2024, arXiv 2310.02743, for the penalty)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .base import BaseRewardModel, Reads, TokenRewards
from .create import make_config, model_class
from .head import require_positive_int


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One head of a MultiRewardModel.

    Args:
        name: what it is logged as.
        model_type: "mlp" or "trajectory".
        options: fields of that type's configuration.
        weight: its factor in the sum.
    """

    name: str
    model_type: str = "mlp"
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _plain(self.options))
        if not self.name.isidentifier():
            raise ValueError(
                f"name {self.name!r} must be letters, digits and _: it names a metric and a file's tensors"
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of {self.name} must be finite, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class MultiRewardConfig:
    """The heads of a MultiRewardModel.

    Args:
        parts: the heads, each with a name of its own.
    """

    parts: tuple[RewardPart, ...]

    def __post_init__(self) -> None:
        parts = tuple(p if isinstance(p, RewardPart) else RewardPart(**p) for p in self.parts)
        object.__setattr__(self, "parts", parts)
        names = [part.name for part in parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"parts must have at least one head, each with a name of its own, got {names}")


@dataclass(frozen=True, kw_only=True)
class EnsembleRewardConfig:
    """The members of an EnsembleRewardModel.

    Args:
        options: fields of the configuration of `member_type`.
        member_type: "mlp" or "trajectory".
        members: how many, at least 2. They differ in how they start, and with dropout in what they see.
        penalty: standard deviations over the members that are taken off the reward; 0 takes none.
    """

    options: Mapping[str, Any]
    member_type: str = "mlp"
    members: int = 4
    penalty: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _plain(self.options))
        require_positive_int("members", self.members)
        if self.members < 2:
            raise ValueError(f"members must be at least 2 to disagree, got {self.members}")
        if not 0.0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be a number of at least 0, got {self.penalty}")


class _Parts(BaseRewardModel):
    """Several models on the same hidden states."""

    reads: ClassVar[Reads] = "hidden_states"
    parts: nn.ModuleDict

    def fit_feature_scale(self, *inputs: Any, **named: Any) -> None:
        for part in self._parts():
            part.fit_feature_scale(*inputs, **named)

    def _parts(self) -> list[BaseRewardModel]:
        return cast(list[BaseRewardModel], list(self.parts.values()))

    def _token_rewards(self, inputs: Sequence[Tensor], weights: Sequence[float]) -> TokenRewards:
        """The weighted sum of the parts' rewards a token, which are of one kind or all brought to sums."""
        given = [part.token_rewards(*inputs) for part in self._parts()]
        kinds = {rewards.kind for rewards in given}
        kind = given[0].kind if len(kinds) == 1 else "attribution" if "attribution" in kinds else "sum"
        length = inputs[1].sum(1, keepdim=True).clamp(min=1)
        total = torch.zeros_like(given[0].values)
        for weight, (values, own) in zip(weights, given, strict=True):
            total = total + weight * (values / length if own == "mean" and kind != "mean" else values)
        return TokenRewards(total, kind)


class MultiRewardModel(_Parts):
    """Several heads, combined by weights; each is there under its name in `components`.

    Args:
        config: see MultiRewardConfig.
    """

    model_type: ClassVar[str] = "multi"
    config_class = MultiRewardConfig
    config: MultiRewardConfig

    def __init__(self, config: MultiRewardConfig) -> None:
        super().__init__(config)
        self.parts = nn.ModuleDict({p.name: _part(p.model_type, p.options, p.name) for p in config.parts})

    def components(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The raw rewards [B] of each head by its name, before its weight."""
        return {name: part(*inputs) for name, part in self.parts.items()}

    def forward(self, *inputs: Any) -> Tensor:
        """The weighted sum of the heads' raw rewards, [B]."""
        rewards = self.components(*inputs)
        return torch.stack([p.weight * rewards[p.name] for p in self.config.parts]).sum(0)

    @property
    def has_token_rewards(self) -> bool:
        return True

    def token_rewards(self, *inputs: Any) -> TokenRewards:
        """The weighted sum of the heads'; an attribution as soon as one of them is."""
        return self._token_rewards(inputs, [p.weight for p in self.config.parts])


class EnsembleRewardModel(_Parts):
    """Members of one shape that start apart, learn side by side, and disagree where they have not been shown.

    Args:
        config: see EnsembleRewardConfig.
    """

    model_type: ClassVar[str] = "ensemble"
    config_class = EnsembleRewardConfig
    config: EnsembleRewardConfig

    def __init__(self, config: EnsembleRewardConfig) -> None:
        super().__init__(config)
        names = [f"member{i}" for i in range(config.members)]
        self.parts = nn.ModuleDict({name: _part(config.member_type, config.options, name) for name in names})

    def members(self, *inputs: Tensor) -> Tensor:
        """Raw rewards [M, B] of each member."""
        return torch.stack([part(*inputs) for part in self._parts()])

    def components(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The standard deviation [B] over the members, as "disagreement"."""
        return {"disagreement": self.members(*inputs).std(0, correction=0)}

    def forward(self, *inputs: Any) -> Tensor:
        """The members' mean less the penalty for their disagreement, [B]."""
        std, mean = torch.std_mean(self.members(*inputs), dim=0, correction=0)
        return mean - self.config.penalty * std

    @property
    def has_token_rewards(self) -> bool:
        return self.config.penalty == 0.0

    def token_rewards(self, *inputs: Any) -> TokenRewards:
        """The mean of the members'. A penalty for disagreement belongs to the response, not to its tokens.

        Raises:
            NotImplementedError: with a penalty, which the tokens' rewards would not add up to.
        """
        if not self.has_token_rewards:
            raise NotImplementedError(
                f"an ensemble with penalty = {self.config.penalty} has no rewards a token: the standard deviation "
                "over its members is that of whole responses. Use the members' own, model.parts[...].token_rewards"
            )
        return self._token_rewards(inputs, [1.0 / self.config.members] * self.config.members)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with tuples for lists: what was read back from JSON equals what was written."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _part(model_type: str, options: Mapping[str, Any], name: str) -> BaseRewardModel:
    cls = model_class(model_type, where=f"the type of {name}")
    if cls.reads != "hidden_states" or issubclass(cls, _Parts):
        raise ValueError(f"the type of {name} is {model_type!r}, expected 'mlp' or 'trajectory'")
    return cls(make_config(cls, options, where=f"the options of {name}"))
