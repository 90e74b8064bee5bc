"""Draws are functions of (seed, stream, counter); a position is the whole state of an endless draw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.train.seeds import EndlessDraws, derive_seed, permutation


def test_derived_seeds_are_fixed_distinct_and_fit_a_generator() -> None:
    # A change of this number would make every resumed run and every recorded result another one.
    assert derive_seed(0, "rollout", 0) == 3371320943634921295  # half of sha256("0/rollout/0")[:8], little-endian
    names = [(seed, stream, counter) for seed in range(5) for stream in ("a", "b") for counter in range(50)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Neighbouring numbers must not run together: (1, "a", 11) is not (11, "a", 1) nor ("1/a", ...).
    assert derive_seed(1, "a", 11) != derive_seed(11, "a", 1)


@settings(deadline=None, max_examples=50)
@given(length=st.integers(1, 40), seed=st.integers(0, 100), passes=st.integers(1, 4))
def test_each_pass_is_a_permutation(length: int, seed: int, passes: int) -> None:
    draws = EndlessDraws(list(range(length)), seed, "rows")
    for number in range(passes):
        drawn = draws.draw(length)
        assert sorted(drawn) == list(range(length))
        assert drawn == permutation(length, seed, "rows", number)
        assert draws.position == (number + 1) * length


@settings(deadline=None, max_examples=50)
@given(length=st.integers(1, 13), before=st.integers(0, 40), counts=st.lists(st.integers(0, 20), max_size=5))
def test_a_resumed_draw_equals_the_uninterrupted_one(length: int, before: int, counts: list[int]) -> None:
    straight = EndlessDraws(list(range(length)), 3, "rows")
    straight.draw(before)
    resumed = EndlessDraws(list(range(length)), 3, "rows")
    resumed.position = before
    for count in counts:
        assert straight.draw(count) == resumed.draw(count)
    assert straight.position == resumed.position == before + sum(counts)


def test_passes_seeds_and_streams_differ() -> None:
    def first(seed: int, stream: str, passes: int = 1) -> list[int]:
        draws = EndlessDraws(list(range(100)), seed, stream)
        return draws.draw(100 * passes)[-100:]

    assert first(0, "a") == first(0, "a")
    assert first(0, "a") != first(1, "a")
    assert first(0, "a") != first(0, "b")
    assert first(0, "a") != first(0, "a", 2)
    assert first(0, "a") != list(range(100))


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = EndlessDraws(list(range(10)), 0, "rows").draw(25)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert drawn == EndlessDraws(list(range(10)), 0, "rows").draw(25)


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to draw demonstrations from: the list is empty"):
        EndlessDraws([], 0, "demonstrations")
