"""Samples of earlier policies that go on counting in the reward loss, each under the sampler that drew it.

Guided cost learning keeps them so that Z does not forget what the policy has left behind (Finn, Levine and Abbeel 2016,
section 4.2). Weighted by exp(r) b / q_k with q_k the log-prob recorded when it was drawn, a sample of any policy serves
to estimate Z, however old it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast.rollout import Rollouts, Sequences

from .scoring import sequence_sum

Prompt = tuple[int, ...]


class _Sample(NamedTuple):
    response: tuple[int, ...]
    log_proposal: float


class Replay:
    """The newest samples of each prompt.

    Args:
        size: samples kept for a prompt; 0 keeps none.
        pad_token_id: fills the right of shorter rows.
    """

    def __init__(self, size: int, pad_token_id: int) -> None:
        self.size = size
        self.pad_token_id = pad_token_id
        self._kept: dict[Prompt, list[_Sample]] = {}

    def add(self, samples: Rollouts) -> None:
        """Keep these samples; older ones of their prompts give way."""
        if not self.size:
            return
        log_proposal = sequence_sum(samples.sampler_logprobs, samples).tolist()
        for prompt, response, log_q in zip(*_token_lists(samples), log_proposal, strict=True):
            kept = self._kept.setdefault(prompt, [])
            kept.append(_Sample(response, log_q))
            del kept[: -self.size]

    def of(self, samples: Sequences) -> tuple[Sequences, Tensor] | None:
        """What is kept of the prompts of these samples, in their groups, and its log-probs [N]; None for nothing."""
        prompts: dict[Prompt, int] = {}
        for prompt, group in zip(_token_lists(samples)[0], samples.groups.tolist(), strict=True):
            prompts.setdefault(prompt, group)
        rows = [(prompt, sample, group) for prompt, group in prompts.items() for sample in self._kept.get(prompt, ())]
        if not rows:
            return None
        sequences = Sequences.from_token_lists(
            [list(prompt) for prompt, _, _ in rows],
            [list(sample.response) for _, sample, _ in rows],
            self.pad_token_id,
            [group for _, _, group in rows],
        )
        device = samples.input_ids.device
        return sequences.to(device), torch.tensor([sample.log_proposal for _, sample, _ in rows], device=device)

    def state_dict(self) -> dict[str, list[tuple[Prompt, Prompt, float]]]:
        """Plain tuples and numbers, which torch.load reads with weights_only."""
        return {"samples": [(prompt, *sample) for prompt, kept in self._kept.items() for sample in kept]}

    def load_state_dict(self, state: dict[str, list[tuple[Prompt, Prompt, float]]]) -> None:
        self._kept = {}
        for prompt, response, log_q in state["samples"]:
            self._kept.setdefault(prompt, []).append(_Sample(response, log_q))


def _token_lists(sequences: Sequences) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts and responses of each row, padding left out."""
    real = sequences.attention_mask & ~sequences.response_mask

    def ids(masks: Tensor) -> Iterable[Prompt]:
        return (tuple(row[mask].tolist()) for row, mask in zip(sequences.input_ids, masks, strict=True))

    return list(ids(real)), list(ids(sequences.response_mask))
