import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.rewards import RewardNormalizer


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_statistics_are_those_of_all_rewards_however_they_were_cut(values, cuts, offset):
    # An offset of 1e6 shows a sum of squares that cancels.
    rewards = torch.tensor(values, dtype=torch.float64) + offset
    normalizer = RewardNormalizer()
    for part in torch.tensor_split(rewards, sorted(cuts)):
        normalizer.update(part)
    assert float(normalizer.count) == len(values)
    assert float(normalizer.mean) == pytest.approx(float(rewards.mean()), rel=1e-12, abs=1e-9)
    assert float(normalizer.std) == pytest.approx(float(rewards.std(correction=0)), rel=1e-6, abs=1e-7)


def test_normalised_rewards_have_mean_zero_and_std_one():
    torch.manual_seed(0)
    rewards = 5 + 3 * torch.randn(1000)
    normalizer = RewardNormalizer()
    normalizer.update(rewards)
    normalised = normalizer.normalize(rewards)
    assert normalised.dtype == torch.float32
    assert float(normalised.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(normalised.std(correction=0)) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(normalised.argsort(), rewards.argsort())


def test_before_the_first_update_rewards_pass_unchanged():
    rewards = torch.tensor([1.0, -2.0])
    assert torch.equal(RewardNormalizer().normalize(rewards), rewards)
    assert torch.equal(RewardNormalizer(clip=1.5).normalize(rewards), torch.tensor([1.0, -1.5]))


def test_equal_rewards_are_centred_and_not_blown_up():
    normalizer = RewardNormalizer()
    normalizer.update(torch.full((5,), 0.1))
    assert normalizer.normalize(torch.tensor([0.1])).abs().max() == 0.0
    assert float(normalizer.normalize(torch.tensor([1.1]))) == pytest.approx(1.0, abs=1e-6)


def test_half_life_weighs_rewards_by_their_age():
    normalizer = RewardNormalizer(half_life=10)
    old, new = torch.arange(10.0), torch.arange(10.0) * 3 + 50
    normalizer.update(old)
    normalizer.update(new)  # by now the old ones count half
    weights = torch.cat([torch.full((10,), 0.5), torch.ones(10)])
    values = torch.cat([old, new])
    mean = float((weights * values).sum() / 15)
    assert float(normalizer.count) == pytest.approx(15.0)
    assert float(normalizer.mean) == pytest.approx(mean)
    assert float(normalizer.std) == pytest.approx(math.sqrt(float((weights * (values - mean) ** 2).sum() / 15)))


def test_state_dict_restores_the_same_numbers():
    normalizer, restored = RewardNormalizer(), RewardNormalizer()
    normalizer.update(torch.tensor([1.0, 2.0, 4.0]))
    restored.load_state_dict(normalizer.state_dict())
    for one in (normalizer, restored):
        one.update(torch.tensor([8.0]))
    assert torch.equal(normalizer.mean, restored.mean)
    assert torch.equal(normalizer.std, restored.std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_of_the_module_does_not_round_the_statistics(dtype):
    normalizer = RewardNormalizer()
    normalizer.update(torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64))
    before = normalizer.mean.clone()
    normalizer.to(dtype)
    assert normalizer.mean.dtype == torch.float64
    assert torch.equal(normalizer.mean, before)
    assert {name for name, _ in normalizer.named_buffers()} == {"count", "mean", "m2"}
    assert normalizer.to("meta").mean.device.type == "meta"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_and_changes_nothing(bad):
    normalizer = RewardNormalizer()
    normalizer.update(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"rewards\[1\] = (nan|inf) is not finite"):
        normalizer.update(torch.tensor([0.0, bad]))
    assert float(normalizer.count) == 2.0
    assert float(normalizer.mean) == 1.5


@pytest.mark.parametrize("option", ["half_life", "clip", "epsilon"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_options_must_be_positive(option, value):
    with pytest.raises(ValueError, match=f"{option} must be above 0"):
        RewardNormalizer(**{option: value})
