"""losses.group_advantages, losses.shaped_rewards and losses.whiten."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast import ops
from irlfast.losses import Gae, gae, group_advantages, shaped_rewards, whiten
from irlfast.losses.advantages import ADVANTAGE_KINDS

KINDS = pytest.mark.parametrize("kind", ADVANTAGE_KINDS)


def test_values_by_hand() -> None:
    # Group 5: 1, 2, 6 (mean 3, std sqrt(7)); group -1: 4 alone; group 0: 2, 0.
    rewards = torch.tensor([1.0, 4.0, 2.0, 2.0, 0.0, 6.0])
    groups = torch.tensor([5, -1, 5, 0, 0, 5])
    assert group_advantages(rewards, groups, kind="dr_grpo").tolist() == [-2.0, 0.0, -1.0, 1.0, -1.0, 3.0]
    assert group_advantages(rewards, groups, kind="rloo").tolist() == [-3.0, 0.0, -1.5, 2.0, -2.0, 4.5]
    s = math.sqrt(7.0)
    want = [-2 / s, 0.0, -1 / s, 1 / math.sqrt(2), -1 / math.sqrt(2), 3 / s]
    assert group_advantages(rewards, groups, kind="grpo", eps=0.0).tolist() == pytest.approx(want)
    assert float(group_advantages(rewards, groups, kind="grpo", eps=1.0)[5]) == pytest.approx(3 / (s + 1))


@settings(deadline=None)
@given(
    rewards=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 2**16),
    shift=st.floats(-100, 100),
    kind=st.sampled_from(ADVANTAGE_KINDS),
)
def test_sum_to_zero_ignore_a_shift_and_follow_a_permutation(
    rewards: list[float], seed: int, shift: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(rewards, dtype=torch.float64).round(decimals=3)
    groups = torch.randint(-2, 3, values.shape, generator=generator)
    got = group_advantages(values, groups, kind=kind)
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, groups + 2, got)
    torch.testing.assert_close(sums, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    order = torch.randperm(len(rewards), generator=generator)
    torch.testing.assert_close(group_advantages(values[order], groups[order], kind=kind), got[order])
    # eps keeps grpo from being exactly shift-free only through rounding of the sum
    torch.testing.assert_close(group_advantages(values + shift, groups, kind=kind), got, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(rewards=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9))
def test_rloo_subtracts_the_mean_of_the_others(rewards: list[float]) -> None:
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards)).long(), kind="rloo")
    want = [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert got.tolist() == pytest.approx(want, abs=1e-9)


@KINDS
def test_group_of_one_and_group_without_variance_are_exactly_zero(kind: str) -> None:
    """The mean of three 0.1 differs from 0.1 in float: grpo once divided that by eps."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0])
    assert group_advantages(rewards, torch.tensor([0, 0, 0, 1]), kind=kind, eps=0.0).tolist() == [0.0] * 4


@KINDS
def test_detached_and_empty(kind: str) -> None:
    groups = torch.tensor([0, 0])
    assert not group_advantages(torch.tensor([1.0, 2.0], requires_grad=True), groups, kind=kind).requires_grad
    assert group_advantages(torch.zeros(0), groups[:0], kind=kind).shape == (0,)


def test_group_advantages_errors() -> None:
    two = torch.zeros(2)
    with pytest.raises(ValueError, match="kind is 'gae'; expected one of"):
        group_advantages(two, torch.tensor([0, 0]), kind="gae")
    with pytest.raises(ValueError, match=r"groups has shape \(3,\); expected one id a row, \(2,\)"):
        group_advantages(two, torch.tensor([0, 0, 0]), kind="grpo")
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        group_advantages(torch.tensor([0.0, torch.nan]), torch.tensor([0, 0]), kind="grpo")
    with pytest.raises(ValueError, match=r"rewards has shape \(1, 2\); expected \[N\]"):
        group_advantages(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), kind="grpo")
    with pytest.raises(TypeError, match=r"rewards has dtype torch.int64"):
        group_advantages(torch.tensor([0, 1]), torch.tensor([0, 0]), kind="grpo")


def test_whiten_values_and_masked_garbage() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -torch.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    s = math.sqrt(7.0)
    assert whiten(x, mask).flatten().tolist() == pytest.approx([-2 / s, -1 / s, 0, 3 / s, 0, 0])
    torch.manual_seed(0)
    white = whiten(torch.randn(5, 7) * 3 + 100)
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.std()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        ([5.0], [True]),
        ([0.1, 0.1, 0.1], [True, True, True]),
        ([5.0, torch.nan], [True, False]),
        ([torch.nan, 1.0], [False, False]),
        ([], []),
    ],
)
def test_whiten_without_variance_is_zero_with_gradient_zero(x: list[float], mask: list[bool]) -> None:
    """Whitening one sample once gave NaN, in the value and in the gradient."""
    values = torch.tensor(x, requires_grad=True)
    result = whiten(values, torch.tensor(mask, dtype=torch.bool))
    result.sum().backward()
    assert result.tolist() == [0.0] * len(x)
    assert values.grad.tolist() == [0.0] * len(x)


def test_whiten_gradcheck_and_errors() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) > 0.4
    assert torch.autograd.gradcheck(lambda v: whiten(v, mask), x)
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); expected that of x, \(3, 4\)"):
        whiten(x, mask[0])


def test_gae_is_the_op() -> None:
    assert gae is ops.gae
    assert Gae is ops.Gae


# Response 0 ends in a hole of the mask; 1 is masked throughout; 2 has one token.
SHAPED_MASK = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shaped_rewards_by_hand(garbage: float, dtype: torch.dtype) -> None:
    real = SHAPED_MASK.bool()
    old = torch.full((3, 5), garbage, dtype=dtype).masked_scatter(real, torch.tensor([-1.0, -2.0, -3.0], dtype=dtype))
    ref = torch.full((3, 5), garbage, dtype=dtype).masked_scatter(real, torch.tensor([-2.0, -1.5, -3.0], dtype=dtype))
    rewards = torch.tensor([5.0, 7.0, -1.0], dtype=dtype, requires_grad=True)
    got = shaped_rewards(rewards, old, ref, SHAPED_MASK, beta=0.5)
    want = [[0.0, -0.5, 0.0, 5.25, 0.0], [0.0] * 5, [0.0, 0.0, -1.0, 0.0, 0.0]]
    assert got.dtype == dtype
    assert not got.requires_grad
    assert got.tolist() == want
    for offsets in (torch.int32, torch.int64):
        flat = [x.flatten() for x in (old, ref, SHAPED_MASK)]
        cuts = torch.tensor([0, 5, 10, 15], dtype=offsets)
        assert torch.equal(shaped_rewards(rewards, *flat, beta=0.5, cu_seqlens=cuts), got.flatten())


def test_shaped_rewards_of_packed_responses_some_of_them_empty() -> None:
    old, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.zeros(3)
    cuts = torch.tensor([0, 0, 2, 2, 3, 3])
    got = shaped_rewards(torch.tensor([9.0, 1.0, 9.0, 2.0, 9.0]), old, ref, beta=1.0, cu_seqlens=cuts)
    assert got.tolist() == [1.0, 3.0, 5.0]
    assert shaped_rewards(torch.zeros(0), old[:0], ref[:0], beta=1.0, cu_seqlens=cuts[:1]).shape == (0,)
    assert shaped_rewards(torch.zeros(2), torch.zeros(2, 0), torch.zeros(2, 0), beta=1.0).shape == (2, 0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), beta=st.sampled_from([0.0, 0.1, 2.0]))
def test_shaped_rewards_sum_to_the_penalised_reward(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, ref = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) > 0.7
    want = torch.where(mask.any(1), rewards, 0.0) - beta * ((old - ref) * mask).sum(1)
    got = shaped_rewards(rewards, old, ref, mask, beta=beta)
    torch.testing.assert_close(got.sum(1), want, rtol=1e-12, atol=1e-12)
    # With gamma = lam = 1 the first token's return is all of them.
    returns = gae(got, torch.zeros_like(got), mask, lam=1.0).returns
    some = mask.any(1)
    torch.testing.assert_close(returns[some, mask.int().argmax(1)[some]], want[some], rtol=1e-12, atol=1e-12)


def test_shaped_rewards_errors() -> None:
    zero, two = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"beta is -1; expected a number that is at least 0"):
        shaped_rewards(two, zero, zero, beta=-1)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\); expected \(2,\)"):
        shaped_rewards(torch.zeros(3), zero, zero, beta=0.1)
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(3,\); expected \(2, 3\)"):
        shaped_rewards(two, zero, zero[0], beta=0.1)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); expected \(2, 3\)"):
        shaped_rewards(two, zero, zero, two, beta=0.1)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(3,\); expected padded \[B, T\]"):
        shaped_rewards(two, zero[0], zero[0], beta=0.1)
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 2; expected from 0 to 3"):
        shaped_rewards(two, zero[0], zero[0], beta=0.1, cu_seqlens=torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"rewards has dtype torch.int64"):
        shaped_rewards(two.long(), zero, zero, beta=0.1)
