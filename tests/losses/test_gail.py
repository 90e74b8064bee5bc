"""gail_loss: values by the definition, its equilibrium, its three policy rewards."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.losses import GailObjective, RewardBatch, gail_loss
from irlfast.losses.discriminator import discriminator_loss

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(expert=LOGITS, sample=LOGITS, smoothing=st.sampled_from([0.0, 0.1, 0.4]))
def test_value_is_the_cross_entropy(expert: list[float], sample: list[float], smoothing: float) -> None:
    def log_sigma(z: float) -> float:
        return -math.log1p(math.exp(-z)) if z > -700 else z

    def entropy(z: float) -> float:
        return -(1 - smoothing) * log_sigma(z) - smoothing * log_sigma(-z)

    want = sum(map(entropy, expert)) / len(expert) + sum(entropy(-z) for z in sample) / len(sample)
    got = gail_loss(
        torch.tensor(expert, dtype=torch.float64), torch.tensor(sample, dtype=torch.float64), label_smoothing=smoothing
    )
    assert float(got.loss) == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_a_logit_of_zero_costs_two_log_two() -> None:
    assert float(gail_loss(torch.zeros(3), torch.zeros(5)).loss) == pytest.approx(2 * math.log(2), abs=1e-6)


def test_gradcheck_and_large_logits() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda e, s: gail_loss(e, s, label_smoothing=0.1).loss, inputs)
    expert, sample = torch.tensor([-500.0], requires_grad=True), torch.tensor([500.0], requires_grad=True)
    loss = gail_loss(expert, sample).loss
    assert float(loss.detach()) == 1000.0
    assert torch.autograd.grad(loss, (expert, sample)) == (torch.tensor([-1.0]), torch.tensor([1.0]))


@pytest.mark.parametrize("kind", ["softplus", "logit", "logsigmoid"])
def test_policy_rewards_by_their_formula_and_monotone(kind: str) -> None:
    logits = torch.linspace(-12, 12, 49, dtype=torch.float64)
    d = torch.sigmoid(logits)
    want = {"softplus": -torch.log(1 - d), "logit": torch.log(d) - torch.log(1 - d), "logsigmoid": torch.log(d)}[kind]
    got = GailObjective(policy_reward_kind=kind).policy_reward(logits)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert bool((got.diff() > 0).all())


def test_metrics_by_hand() -> None:
    batch = RewardBatch(
        expert_rewards=torch.tensor([2.0, -1.0]),
        sample_rewards=torch.tensor([1.0, -3.0, 0.5]),
        expert_groups=torch.tensor([0, 1]),
        sample_groups=torch.tensor([0, 0, 1]),
    )
    metrics = {k: float(v) for k, v in GailObjective().loss(batch).metrics.items()}
    assert metrics == {
        "expert_reward": 0.5,
        "sample_reward": -0.5,
        "margin": 1.0,
        "auc": pytest.approx(2 / 3),  # 2 beats 1 and -3; -1 loses to 0.5
        "max_abs_reward": 3.0,
        "expert_accuracy": 0.5,
        "sample_accuracy": pytest.approx(1 / 3),
    }


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("policy_reward_kind = 'odds', expected one of ('softplus'")):
        GailObjective(policy_reward_kind="odds")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("label_smoothing = 0.5, expected a share in [0, 0.5)")):
        discriminator_loss(torch.zeros(1), torch.zeros(1), label_smoothing=0.5)
    with pytest.raises(ValueError, match=re.escape("sample_logits[0] is nan")):
        gail_loss(torch.zeros(1), torch.tensor([torch.nan]))
