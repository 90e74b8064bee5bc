"""WeightedObjective: the simple form, its gradient, and the warning where it is not shift-invariant."""

import re
import warnings

import pytest
import torch

from irlfast.losses import RewardBatch, WeightedObjective

BATCH = RewardBatch(
    expert_rewards=torch.tensor([1.0, 2.0]),
    sample_rewards=torch.tensor([0.0, 3.0, -6.0]),
    sample_logprobs=torch.tensor([-1.0, -2.0, -6.0]),
)


def test_value_by_hand() -> None:
    assert float(WeightedObjective().loss(BATCH).loss) == pytest.approx(-1.5 - 1.0)
    assert float(WeightedObjective(reward_weight=2.0, policy_weight=2.0).loss(BATCH).loss) == pytest.approx(-5.0)
    assert float(WeightedObjective(entropy_weight=0.1).loss(BATCH).loss) == pytest.approx(-2.5 - 0.3)  # H = 3
    assert float(WeightedObjective(centre=0.2).loss(BATCH).loss) == pytest.approx(-2.5 + 0.1 * (2.5 + 15.0))


def test_gradient_is_that_of_maxent_where_the_samples_come_from_the_model() -> None:
    """121 strings each with its share: sampling p = softmax(r) itself makes the importance weights equal."""
    torch.manual_seed(0)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(40, 3, dtype=torch.float64)
    p = torch.softmax(phi @ theta, 0).detach()
    drawn = torch.multinomial(p, 200_000, replacement=True)
    batch = RewardBatch(expert_rewards=(phi @ theta)[:5], sample_rewards=(phi @ theta)[drawn])
    (got,) = torch.autograd.grad(WeightedObjective().loss(batch).loss, theta)
    want = p @ phi - phi[:5].mean(0)
    torch.testing.assert_close(got, want, rtol=0, atol=0.01)


def test_weights_that_differ_are_warned_about_in_words() -> None:
    with pytest.warns(
        UserWarning, match=re.escape("reward_weight = 1.0 and policy_weight = 0.1 differ: the loss is not")
    ):
        WeightedObjective(policy_weight=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightedObjective(reward_weight=0.5, policy_weight=0.5)


@pytest.mark.parametrize("name", ["reward_weight", "policy_weight", "entropy_weight", "centre"])
def test_bad_weights_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = -1"):
        WeightedObjective(**{name: -1})


def test_entropy_needs_log_probs() -> None:
    batch = RewardBatch(expert_rewards=torch.zeros(1), sample_rewards=torch.zeros(1))
    assert WeightedObjective(entropy_weight=0.5).needs == {"sample_logprobs"}
    with pytest.raises(ValueError, match="weighted with entropy_weight needs sample_logprobs"):
        WeightedObjective(entropy_weight=0.5).loss(batch)
