"""Random draws as functions of (seed, stream, counter), so that a resumed run repeats them without saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def derive_seed(seed: int, stream: str, counter: int) -> int:
    """A 63-bit seed that depends on all three and is the same on every machine and Python version."""
    digest = hashlib.sha256(f"{seed}/{stream}/{counter}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(length: int, seed: int, stream: str, counter: int) -> list[int]:
    """A random order of range(length)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, stream, counter))
    return torch.randperm(length, generator=generator).tolist()


class EndlessDraws(Generic[T]):
    """Draws items in a fresh random order for each pass through them, for ever; `position` is its whole state."""

    def __init__(self, items: Sequence[T], seed: int, stream: str) -> None:
        if not items:
            raise ValueError(f"nothing to draw {stream} from: the list is empty")
        self._items = items
        self._seed = seed
        self._stream = stream
        self._pass = -1
        self._order: list[int] = []
        self.position = 0

    def draw(self, count: int) -> list[T]:
        """The next `count` items; a draw may span two passes."""
        drawn = []
        for _ in range(count):
            number, offset = divmod(self.position, len(self._items))
            if number != self._pass:
                self._order = permutation(len(self._items), self._seed, self._stream, number)
                self._pass = number
            drawn.append(self._items[self._order[offset]])
            self.position += 1
        return drawn
