"""Rewards that are functions of the text: a Python function, or a classifier of transformers.

They are not learned here, but a policy is tuned on them, and a learned reward is judged by them. Such a reward is told
the prompt's and the response's text, whatever language model wrote it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import BaseRewardModel, Reads

TextReward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) -> one number each, higher is better."""


@dataclass(frozen=True, kw_only=True)
class TextRewardConfig:
    """name: what the function was called; a checkpoint says so, and never imports it."""

    name: str = ""


class TextRewardModel(BaseRewardModel):
    """A function of the text as a reward model: it can be served, normalised and evaluated, but not trained.

    Args:
        config: its name.
        function: (prompts, responses) -> numbers. None, as after loading from a file: it cannot be called.
        tokenizer: turns token ids into text.
    """

    model_type: ClassVar[str] = "text"
    reads: ClassVar[Reads] = "tokens"
    config_class = TextRewardConfig
    config: TextRewardConfig

    def __init__(
        self, config: TextRewardConfig, *, function: TextReward | None = None, tokenizer: Any | None = None
    ) -> None:
        super().__init__(config)
        self._function = function
        self._tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Rewards [B] float32 of the texts, special tokens left out; without gradient.

        Raises:
            RuntimeError: the function is not there (the model was read from a file).
            ValueError: the function gave another number of rewards than of texts, or one that is not finite.
        """
        if self._function is None or self._tokenizer is None:
            raise RuntimeError(
                f"the function {self.config.name!r} is not stored in a file: make "
                "TextRewardModel(config, function=..., tokenizer=...) again"
            )
        prompts = self._decode(input_ids, attention_mask & ~response_mask)
        responses = self._decode(input_ids, response_mask)
        rewards = [float(value) for value in self._function(prompts, responses)]
        if len(rewards) != len(responses):
            raise ValueError(f"{self.config.name} gave {len(rewards)} rewards for {len(responses)} responses")
        for i, value in enumerate(rewards):
            if not math.isfinite(value):
                raise ValueError(f"{self.config.name} gave {value} for the response {responses[i][:60]!r}")
        return torch.tensor(rewards, dtype=torch.float32, device=input_ids.device)

    def fit_feature_scale(self, *inputs: Any, **named: Any) -> None:
        """Nothing: a function of the text reads no features."""

    def _decode(self, input_ids: Tensor, mask: Tensor) -> list[str]:
        assert self._tokenizer is not None
        rows = [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
        return [str(text) for text in self._tokenizer.batch_decode(rows, skip_special_tokens=True)]


def load_text_reward(name: str) -> TextReward:
    """The reward that a name stands for.

    Args:
        name: "package.module.function", a function (prompts, responses) -> numbers; or the folder or hub name of a
            sequence classifier of transformers with one label, whose logit is the reward of prompt + response.

    Raises:
        ValueError: neither of the two.
    """
    if Path(name).is_dir() or "/" in name:
        return classifier_reward(name)
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise ValueError(f"reward {name!r} is no folder and no package.module.function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise ValueError(f"reward {name!r} cannot be imported: {cause}") from cause
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function of (prompts, responses)")
    reward: TextReward = function
    return reward


def classifier_reward(folder: str, *, batch_size: int = 32) -> TextReward:
    """The logit of a sequence classifier for prompt + response, cut on the left to what the classifier takes.

    Raises:
        ValueError: a classifier with more than one label, or without a pad token.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"{folder} has {model.config.num_labels} labels; a reward needs a classifier with one")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {folder} has no pad token: the classifier could not tell where a text ends")

    @torch.no_grad()
    def rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        found: list[float] = []
        for low in range(0, len(texts), batch_size):
            batch = tokenizer(texts[low : low + batch_size], return_tensors="pt", padding=True, truncation=True)
            found += model(**batch.to(model.device)).logits[:, 0].float().tolist()
        return found

    return rewards
