"""The Triton gae, through the public op."""

from __future__ import annotations

import pytest
import torch
from segment_cases import LONG, RAGGED, narrow, offsets, pack, sequences
from triton_mutation import assert_noticed

from irlfast.ops import gae
from irlfast.ops.gae import gae_reference


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(request, monkeypatch)


def check(
    device: str, dtype: torch.dtype, layout: str, gamma: float, lam: float, lengths: list[int], *, last: bool = True
) -> None:
    mask, draw = sequences(lengths)
    rewards, values = draw().to(dtype), draw().to(dtype)
    cu_seqlens = None
    if layout != "padded":
        rewards, values, mask = (pack(x, lengths) for x in (rewards, values, mask))
        cu_seqlens = offsets(lengths, torch.int32 if "32" in layout else torch.int64)
    last_values = torch.randn(len(lengths), dtype=torch.float64).to(dtype) if last else None
    got = gae(
        rewards.to(device),
        values.to(device),
        mask.to(device),
        gamma=gamma,
        lam=lam,
        last_values=None if last_values is None else last_values.to(device),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device),
        impl="triton",
    )
    want = gae_reference(
        rewards.double(),
        values.double(),
        mask,
        gamma=gamma,
        lam=lam,
        last_values=None if last_values is None else last_values.double(),
        cu_seqlens=cu_seqlens,
    )
    # Everything runs in float64 and is rounded once.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1.2e-7, "atol": 1e-9}
    for mine, exact in zip(got, want, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.cpu().double(), exact, **tolerance)
        assert (mine.cpu()[~mask] == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed int32"])
def test_matches_float64(device: str, layout: str, gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    check(device, torch.float64, layout, gamma, lam, RAGGED, last=layout != "packed int32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(device, dtype, "padded", 0.99, 0.95, RAGGED)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_float64_in_real_sizes(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    check("cuda", dtype, layout, 0.999, 0.95, LONG)


def test_no_mask_no_rows_no_tokens(device: str) -> None:
    torch.manual_seed(2)
    rewards, values = torch.randn(2, 18, dtype=torch.float64), torch.randn(2, 18, dtype=torch.float64)
    got = gae(rewards.to(device), values.to(device), impl="triton")
    for mine, exact in zip(got, gae_reference(rewards, values), strict=True):
        torch.testing.assert_close(mine.cpu(), exact, rtol=1e-12, atol=1e-12)
    for shape in ((0, 3), (2, 0)):
        zero = torch.zeros(shape, device=device)
        assert gae(zero, zero, impl="triton").advantages.shape == shape


def test_a_nan_reaches_its_token_and_those_before_it(device: str) -> None:
    """As in the recurrence: those after it know nothing of it, in the same block or another."""
    values = torch.zeros(1, 40, device=device)
    rewards = torch.zeros(1, 40, device=device)
    rewards[0, 20] = torch.nan
    advantages = gae(rewards, values, impl="triton").advantages.cpu()
    assert advantages[0, :21].isnan().all()
    assert (advantages[0, 21:] == 0).all()


BREAKS = {
    "a masked token's decay": ("tl.where(counts, decay, 1.0)", "decay + tl.zeros([BLOCK], tl.float64)"),
    "the value after a block": ("tl.where(lane == BLOCK - 1, next_value, after_value)", "after_value"),
    "the advantage after a block": ("current = factor * advantage + term", "current = term"),
    "the next token in place of the next unmasked one": (
        "return tl.where(counts != 0, value, later_value), later_counts | counts",
        "return value, later_counts | counts",
    ),
    "discount": ("decay = discount * number(lam)", "decay = number(lam)"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed(name: str) -> None:
    def proof() -> None:
        torch.manual_seed(0)
        check("cpu", torch.float64, "packed", 0.9, 0.95, RAGGED)

    assert_noticed("gae", *BREAKS[name], proof)
