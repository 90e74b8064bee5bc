"""Demonstrations of the prompts that a generation answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from irlfast.data import TokenizedDemonstration
from irlfast.rollout import Sequences
from irlfast.train.seeds import EndlessDraws

from .ranks import rank_and_world


class Experts:
    """Draws demonstrations of each prompt in a fresh random order for each pass through them.

    Args:
        rows: all demonstrations.
        per_prompt: how many are drawn for a prompt, at most as many as it has.
        pooled: take them from all demonstrations, whatever their prompt.
        seed: of the orders, which differ from rank to rank.
    """

    def __init__(self, rows: Sequence[TokenizedDemonstration], *, per_prompt: int, pooled: bool, seed: int) -> None:
        self.rows = list(rows)
        self._per_prompt = per_prompt
        self._pooled = pooled
        by_prompt: dict[tuple[int, ...], list[TokenizedDemonstration]] = {}
        for row in rows:
            by_prompt.setdefault(() if pooled else row.prompt_ids, []).append(row)
        self._place = {prompt: place for place, prompt in enumerate(by_prompt)}
        self._by_prompt = list(by_prompt.values())
        self._seed = seed

    @cached_property
    def _draws(self) -> list[EndlessDraws[TokenizedDemonstration]]:
        rank = rank_and_world()[0]  # known when the trainer is there, before which this object may be made
        return [
            EndlessDraws(rows, self._seed, f"demonstrations {place} {rank}")
            for place, rows in enumerate(self._by_prompt)
        ]

    def draw(self, samples: Sequences, prompts: Sequence[Any], pad_token_id: int) -> Sequences:
        """Demonstrations of each different prompt among `samples`, in their groups; pooled, all in group 0.

        Args:
            samples: the policy's, rows of one prompt in one group, or pooled, all in group 0.
            prompts: what they answer, as the trainer gave it, for the error.
            pad_token_id: fills the right of shorter rows.

        Raises:
            ValueError: a prompt that no demonstration has.
        """
        real = samples.attention_mask & ~samples.response_mask
        asked: dict[tuple[int, ...], int] = {}
        for row in range(len(samples)):
            asked.setdefault(tuple(samples.input_ids[row][real[row]].tolist()), row)
        drawn: list[TokenizedDemonstration] = []
        groups: list[int] = []
        for prompt, row in asked.items():
            place = self._place.get(() if self._pooled else prompt)
            if place is None:
                raise ValueError(
                    f"no demonstration has the prompt {prompts[row]!r}, token ids {list(prompt)}; those of the first "
                    f"demonstration are {list(self.rows[0].prompt_ids)}. Take the data set's prompts from "
                    "demonstrations_for_trl, or set pairing = 'pooled'"
                )
            count = min(self._per_prompt, len(self._by_prompt[place]))
            drawn += self._draws[place].draw(count)
            groups += [int(samples.groups[row])] * count
        return Sequences.from_token_lists(
            [list(row.prompt_ids) for row in drawn], [list(row.response_ids) for row in drawn], pad_token_id, groups
        ).to(samples.input_ids.device)

    def state_dict(self) -> dict[int, int]:
        """Where each prompt's draws stand, those at the start left out."""
        return {place: draws.position for place, draws in enumerate(self._draws) if draws.position}

    def load_state_dict(self, state: dict[int, int]) -> None:
        for place, draws in enumerate(self._draws):
            draws.position = state.get(place, 0)
