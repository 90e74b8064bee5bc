"""What the frozen models say of sequences: the inputs of the reward, and the base's log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.rewards import BaseRewardModel, ReaderConfig, read
from irlfast.rewards.reader import lasting_name, weights_digest
from irlfast.rollout import Sequences

from .config import BiLevelConfig
from .experience import Scored
from .scoring import response_scores, sequence_sum

FeatureFunction = Callable[[Tensor, Tensor], Tensor]


class Scorer:
    """Scores sequences in micro-batches.

    Args:
        reward: what the inputs are for.
        reference: frozen causal LM, or None where nothing asks for one.
        features: (input_ids, attention_mask) -> [B, S, H] in place of the reference's states.
        config: the run's.

    Raises:
        ValueError: a reward model that was made to read other states than the configuration says.
    """

    def __init__(
        self,
        reward: BaseRewardModel,
        reference: nn.Module | None,
        features: FeatureFunction | None,
        config: BiLevelConfig,
    ) -> None:
        self.reward, self.reference, self.features, self.config = reward, reference, features, config
        if features is None and reward.reads == "hidden_states":
            _set_source(reward, reference, config)

    @torch.no_grad()
    def __call__(self, sequences: Sequences) -> Scored:
        """What the reward reads of sequences, and their base log-prob."""
        size = self.config.reward.micro_batch_size
        states, log_base, base_logprobs = [], [], []
        for low in range(0, len(sequences), size):
            part = sequences.select(slice(low, low + size))
            if self.features is not None:
                states.append(self.features(part.input_ids, part.attention_mask))
            if self.reference is None:
                continue
            if self.features is None and self.reward.source is not None:
                reading = read(
                    self.reference, part.input_ids, part.attention_mask, part.response_mask, self.reward.source
                )
                states.append(reading.hidden_states)
                logprob = reading.stats.logprob
            else:
                logprob = response_scores(self.reference, part).stats.logprob
            log_base.append(sequence_sum(logprob, part))
            base_logprobs.append(logprob)
        if self.reward.reads == "tokens":
            inputs = (sequences.input_ids, sequences.attention_mask, sequences.response_mask)
        else:
            inputs = (torch.cat(states), sequences.response_mask, sequences.attention_mask)
        if self.config.regularizer == "kl":
            base, tokens = torch.cat(log_base), torch.cat(base_logprobs)
        else:
            base, tokens = torch.zeros(len(sequences)), torch.zeros(sequences.input_ids.shape)
        device = sequences.input_ids.device
        return Scored(inputs=inputs, log_base=base.to(device), base_logprobs=tokens.to(device))


def stack(first: Tensor, second: Tensor) -> Tensor:
    """Two batches [B, S, ...] below one another, zeros to the right of the narrower one."""
    width = max(first.shape[1], second.shape[1])
    parts = []
    for part in (first, second):
        fill = part.new_zeros(part.shape[0], width - part.shape[1], *part.shape[2:])
        parts.append(torch.cat([part, fill], dim=1))
    return torch.cat(parts)


def _set_source(reward: BaseRewardModel, reference: Any, config: BiLevelConfig) -> None:
    """Let the reward know what it reads, which is saved with it; or check that it knows."""
    statistics = config.reward.token_statistics
    if reward.source is None:
        name = getattr(getattr(reference, "config", None), "name_or_path", "")
        reward.source = ReaderConfig(
            model=lasting_name(name), token_statistics=statistics, weights=weights_digest(reference)
        )
    elif reward.source.token_statistics != statistics:
        raise ValueError(
            f"reward.token_statistics is {statistics}, the reward model was made with {reward.source}: let both agree"
        )
