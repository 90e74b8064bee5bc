"""Losses on pairs: max margin, Bradley-Terry, SPIN. Values by hand, gradients, shifts, projection, errors."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.losses import (
    BradleyTerryObjective,
    MaxMarginObjective,
    Objective,
    RewardBatch,
    RewardLoss,
    SpinObjective,
    bradley_terry_loss,
    make_objective,
    max_margin_loss,
    project_on_ball,
    spin_loss,
)

CHOSEN, REJECTED = torch.tensor([3.0, 0.0, -1.0, 1.0]), torch.tensor([1.0, 2.0, -1.0, 0.5])  # d = 2, -2, 0, .5


def spin(chosen: Tensor, rejected: Tensor) -> RewardLoss:
    zero = torch.zeros_like(chosen)
    return spin_loss(chosen, rejected, zero, zero, scale=1.0)


PAIR_LOSSES: list[Callable[[Tensor, Tensor], RewardLoss]] = [
    max_margin_loss,
    lambda c, r: max_margin_loss(c, r, kind="hinge"),
    bradley_terry_loss,
    lambda c, r: bradley_terry_loss(c, r, margin=0.3, label_smoothing=0.1),
    spin,
]


def test_ng_russell_by_hand() -> None:
    # -2, then twice 2, then 0 (d = 0 gains nothing), then -.5
    assert float(max_margin_loss(CHOSEN, REJECTED).loss) == pytest.approx((-2 + 4 + 0 - 0.5) / 4)


def test_hinge_by_hand() -> None:
    assert float(max_margin_loss(CHOSEN, REJECTED, kind="hinge").loss) == pytest.approx((0 + 3 + 1 + 0.5) / 4)
    assert float(max_margin_loss(CHOSEN, REJECTED, kind="hinge", margin=3.0).loss) == pytest.approx(
        (1 + 5 + 3 + 2.5) / 4
    )
    theta = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    with_l2 = max_margin_loss(CHOSEN, REJECTED, kind="hinge", l2=0.1, parameters=iter(theta)).loss
    assert float(with_l2) == pytest.approx(4.5 / 4 + 0.1 * 14)


def test_bradley_terry_by_hand() -> None:
    def minus_log_sigma(z: float) -> float:
        return math.log1p(math.exp(-z))

    plain = [minus_log_sigma(d) for d in (2, -2, 0, 0.5)]
    assert float(bradley_terry_loss(CHOSEN, REJECTED).loss) == pytest.approx(sum(plain) / 4)
    shifted = [minus_log_sigma(d - 1) for d in (2, -2, 0, 0.5)]
    assert float(bradley_terry_loss(CHOSEN, REJECTED, margin=1.0).loss) == pytest.approx(sum(shifted) / 4)
    per_pair = bradley_terry_loss(CHOSEN, REJECTED, margin=torch.tensor([1.0, 0.0, 1.0, 0.0])).loss
    assert float(per_pair) == pytest.approx((shifted[0] + plain[1] + shifted[2] + plain[3]) / 4)
    centred = bradley_terry_loss(CHOSEN, REJECTED, centre=0.5).loss
    assert float(centred) == pytest.approx(sum(plain) / 4 + 0.5 * (16 + 4 + 4 + 2.25) / 4)
    smoothed = bradley_terry_loss(CHOSEN, REJECTED, label_smoothing=0.2).loss
    other = [minus_log_sigma(-d) for d in (2, -2, 0, 0.5)]
    assert float(smoothed) == pytest.approx(0.8 * sum(plain) / 4 + 0.2 * sum(other) / 4)


@pytest.mark.parametrize(
    ("link", "of"),
    [
        ("logistic", lambda t: math.log1p(math.exp(-t))),
        ("hinge", lambda t: max(0.0, 1 - t)),
        ("exponential", lambda t: math.exp(-t)),
    ],
)
def test_spin_by_hand(link: str, of: Callable[[float], float]) -> None:
    old = torch.tensor([-1.0, 0.5, 0.0, 2.0]), torch.tensor([0.0, 1.0, -2.0, 0.5])
    got = spin_loss(CHOSEN, REJECTED, *old, scale=0.5, link=link)  # type: ignore[arg-type]
    differences = [0.5 * ((c - co) - (r - ro)) for c, r, co, ro in zip(CHOSEN, REJECTED, *old, strict=True)]
    assert float(got.loss) == pytest.approx(sum(of(float(d)) for d in differences) / 4)
    as_reward = SpinObjective(link=link).pair_loss(CHOSEN, REJECTED, BATCH).loss  # type: ignore[arg-type]
    assert float(as_reward) == pytest.approx(sum(of(d) for d in (2, -2, 0, 0.5)) / 4)


def test_spin_trains_the_new_model_and_leaves_the_old_one() -> None:
    new, old = (
        [CHOSEN.clone().requires_grad_() for _ in range(2)],
        [REJECTED.clone().requires_grad_() for _ in range(2)],
    )
    spin_loss(*new, *old).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in new)
    assert all(p.grad is None for p in old)
    assert bool((new[0].grad < 0).all())  # type: ignore[operator]


@settings(deadline=None, max_examples=20)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_only_differences_count(shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    for loss in PAIR_LOSSES:
        a, b = loss(chosen, rejected), loss(chosen + shift, rejected + shift)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-9, atol=1e-9)
        assert a.metrics["accuracy"] == b.metrics["accuracy"]


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_gradcheck(loss: Callable[[Tensor, Tensor], RewardLoss]) -> None:
    chosen, rejected = (t.double().requires_grad_() for t in (CHOSEN + 0.1, REJECTED))
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r).loss, (chosen, rejected))


def test_metrics_by_hand() -> None:
    metrics = {k: float(v) for k, v in bradley_terry_loss(CHOSEN, REJECTED).metrics.items()}
    assert metrics == {
        "chosen_reward": 0.75,
        "rejected_reward": 0.625,
        "margin": 0.125,
        "accuracy": 0.5,  # the tie is lost
        "max_abs_reward": 3.0,
    }


BATCH = RewardBatch(
    expert_rewards=torch.tensor([3.0, 0.0]),
    sample_rewards=torch.tensor([1.0, 5.0, 2.0]),
    expert_groups=torch.tensor([0, 1]),
    sample_groups=torch.tensor([0, 1, 0]),
)


@pytest.mark.parametrize("name", ["max_margin", "bradley_terry", "spin"])
def test_objectives_pair_each_demonstration_with_the_samples_of_its_prompt(name: str) -> None:
    objective = make_objective(name)
    assert objective.pairwise
    got = objective.loss(BATCH)
    chosen, rejected = torch.tensor([3.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 5.0])
    want = {"max_margin": max_margin_loss, "bradley_terry": bradley_terry_loss, "spin": spin}[name](chosen, rejected)
    torch.testing.assert_close(got.loss, want.loss)
    assert float(got.metrics["accuracy"]) == pytest.approx(2 / 3)
    assert float(got.metrics["auc"]) == pytest.approx(2 / 3)
    assert float(got.metrics["expert_reward"]) == 1.5


def test_projection_scales_all_parameters_as_one_vector() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    norm = float(before.norm())
    assert norm > 1
    assert project_on_ball(module, 0.5) == pytest.approx(norm)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(after, before * (0.5 / norm))
    assert project_on_ball(module, 0.6) == pytest.approx(0.5, rel=1e-5)  # inside: left as it is
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), after)


def test_after_step_projects_for_ng_russell_alone() -> None:
    def norm_after(objective: Objective) -> float:
        module = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(module.weight, 2.0)
        objective.after_step(module)
        return float(torch.cat([p.detach().flatten() for p in module.parameters()]).norm())

    assert norm_after(MaxMarginObjective()) == pytest.approx(1.0)
    assert norm_after(MaxMarginObjective(radius=2.5)) == pytest.approx(2.5)
    assert norm_after(MaxMarginObjective(kind="hinge")) > 3
    assert norm_after(BradleyTerryObjective()) > 3


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=re.escape("rejected has shape (3,); expected that of chosen, (4,)")):
        bradley_terry_loss(CHOSEN, REJECTED[:3])
    with pytest.raises(ValueError, match=r"use irlfast\.losses\.AbbeelNgProjection on feature expectations"):
        max_margin_loss(CHOSEN, REJECTED, kind="abbeel_ng")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind = 'svm', expected 'ng_russell' or 'hinge'"):
        MaxMarginObjective(kind="svm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="used by the hinge alone"):
        MaxMarginObjective(l2=0.1)
    with pytest.raises(ValueError, match=r"l2 is 0\.1 and parameters is empty"):
        max_margin_loss(CHOSEN, REJECTED, kind="hinge", l2=0.1)
    with pytest.raises(ValueError, match=re.escape("margin has shape (2,); expected one number, or one a pair, (4,)")):
        bradley_terry_loss(CHOSEN, REJECTED, margin=torch.zeros(2))
    with pytest.raises(ValueError, match="centre = -1"):
        BradleyTerryObjective(centre=-1)
    with pytest.raises(ValueError, match="link = 'probit'"):
        SpinObjective(link="probit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale = 0"):
        spin_loss(CHOSEN, REJECTED, CHOSEN, REJECTED, scale=0)
