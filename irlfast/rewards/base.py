"""What every reward model is: raw rewards to train on, served ones for the policy, rewards a token, files on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .normalizer import RewardNormalizer
from .reader import ReaderConfig

Reads = Literal["hidden_states", "tokens"]
_M = TypeVar("_M", bound="BaseRewardModel")


class TokenRewards(NamedTuple):
    """What each token adds to a response's raw reward.

    values: [B, S], 0 outside the response.
    kind: how they make up the reward.
        "mean"         their mean over the response is the reward: the model is additive, these are its own terms.
        "sum"          their sum over the response is the reward, the same for a model that adds up.
        "attribution"  their sum is the reward, but the model is not additive: each says how much the answer owes to the
                       token, by a rule of the model's (its `token_rewards` says which), the level shared evenly.
    """

    values: Tensor
    kind: Literal["mean", "sum", "attribution"]

    def total(self, mask: Tensor) -> Tensor:
        """The raw rewards [B] that the tokens' make up over `mask` [B, S]; 0 for an empty response."""
        total = self.values.masked_fill(~mask, 0.0).sum(1, dtype=torch.float64)
        if self.kind == "mean":
            total = total / mask.sum(1).clamp(min=1)
        return total.to(self.values.dtype)

    def above(self, level: float, mask: Tensor) -> Tensor:
        """[B, S], the same with `level` taken off each response's reward, an equal share off each of its tokens.

        With the normaliser's mean for a level, the sign says whether a token speaks for or against its response.
        """
        share: float | Tensor = level
        if self.kind != "mean":
            share = level / mask.sum(1, keepdim=True).clamp(min=1).to(self.values.dtype)
        return (self.values - share).masked_fill(~mask, 0.0)


class BaseRewardModel(nn.Module, ABC):
    """A reward r(x, y), and the statistics to serve it normalised.

    The inputs of `forward`, `serve`, `token_rewards`, `members` and `components` are the same, and depend on `reads`:

        "hidden_states"   hidden_states [B, S, H] of a frozen language model, mask [B, S] bool (the response's tokens),
                          context_mask [B, S] bool (prompt and response; only models that read the prompt need it)
        "tokens"          input_ids [B, S] int64, attention_mask [B, S] bool, response_mask [B, S] bool

    A caller that serves either takes the tuple from a `RewardReader` (or a trainer) and writes `model(*inputs)`.
    """

    model_type: ClassVar[str]
    reads: ClassVar[Reads]
    config_class: ClassVar[type[Any]]
    config: Any
    normalizer: RewardNormalizer
    source: ReaderConfig | None
    """Which language model's states it was trained on; saved with the model. None where nobody said."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.source = None
        self.normalizer = RewardNormalizer()

    @abstractmethod
    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Raw rewards [B], for reward losses. Positions outside the masks are not read."""

    @abstractmethod
    def fit_feature_scale(self, *inputs: Any, **named: Any) -> None:
        """Set the mean and standard deviation that the features are brought to 0 and 1 by; saved with the model.

        Raises:
            ValueError: fewer than two rows, or a feature that is not finite.
        """

    @property
    def has_token_rewards(self) -> bool:
        """Whether `token_rewards` answers."""
        return False

    def token_rewards(self, *inputs: Any, **named: Any) -> TokenRewards:
        """Rewards of the response's tokens, without gradient, dropout off.

        Raises:
            NotImplementedError: this model gives none; the message says why.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rewards a token")

    def token_terms(self, *inputs: Any, **named: Any) -> Tensor:
        """Rewards [B, S] of the response's tokens, with gradient, 0 elsewhere; their sum is the raw reward.

        Raises:
            NotImplementedError: this model's reward is no sum over tokens.
        """
        raise NotImplementedError(
            f"the reward of {type(self).__name__} is no sum over tokens: use the reward model 'trajectory' with "
            "reduction = 'sum'"
        )

    def members(self, *inputs: Tensor) -> Tensor:
        """Raw rewards [M, B] of models that learn side by side: a reward loss is the mean of the losses of the rows.

        One row but for an ensemble, whose members would otherwise all follow one gradient and never disagree.
        """
        rewards: Tensor = self(*inputs)
        return rewards[None]

    def components(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Named raw rewards [B] that the reward is made of, to be logged one by one; none by default."""
        return {}

    def saved_state(self) -> dict[str, Tensor]:
        """The tensors that `save_pretrained` writes, by their names in `state_dict`."""
        return self.state_dict()

    @torch.no_grad()
    def serve(self, *inputs: Tensor, update: bool = False, shape: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Rewards for the policy: raw rewards, normalised by the running statistics, dropout off, without gradient.

        Args:
            inputs: as for `forward`.
            update: first take these rewards into the statistics. A trainer does, a server that only answers does not.
            shape: what the policy is given in place of the raw rewards, an increasing function of them; its values are
                normalised by the statistics of the raw ones.

        Returns:
            [B], as from `forward`.
        """
        with evaluating(self):
            rewards = self(*inputs)
        if update:
            self.normalizer.update(rewards)
        return self.normalizer.normalize(rewards if shape is None else shape(rewards))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `model.safetensors` and `config.json`; see irlfast.rewards.storage."""
        from .storage import save_reward_model

        save_reward_model(self, directory)

    @classmethod
    def from_pretrained(cls: type[_M], directory: str | Path) -> _M:
        """Read what `save_pretrained` wrote, in the class that wrote it; see irlfast.rewards.storage.

        Raises:
            TypeError: the folder holds a reward model that is no `cls`.
        """
        from .storage import load_reward_model

        model = load_reward_model(directory)
        if not isinstance(model, cls):
            raise TypeError(
                f"{directory} holds a {type(model).__name__}, not a {cls.__name__}: "
                "irlfast.rewards.load_reward_model reads every kind"
            )
        return model


def prefix_differences(so_far: Tensor, mask: Tensor, start: Tensor) -> TokenRewards:
    """What each token of the mask changed: r(x, y_<=t) - r(x, y_<t), and an equal share of where it started.

    Args:
        so_far: [B, S], the reward of the prefix that ends at each token of the mask.
        mask: [B, S] bool. start: [B], the reward of the empty prefix.
    """
    # Between tokens of the mask the last one's prefix still stands.
    positions = torch.arange(mask.shape[1], device=mask.device)
    latest = torch.where(mask, positions, 0).cummax(1).values
    so_far = torch.where(mask.cumsum(1) == 0, start[:, None], so_far.gather(1, latest))
    change = so_far - torch.cat([start[:, None], so_far[:, :-1]], dim=1)
    change = change + (start / mask.sum(1).clamp(min=1))[:, None]
    return TokenRewards(change.masked_fill(~mask, 0.0), "attribution")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside a with block; afterwards every submodule is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
