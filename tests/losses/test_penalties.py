"""gradient_penalty and r1_penalty against slopes known by hand, and by finite differences."""

import re

import pytest
import torch
from torch import Tensor

from irlfast.losses import gradient_penalty, r1_penalty


def test_a_linear_score_has_its_weights_norm_everywhere() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    expert, sample = torch.randn(3, 2), torch.randn(5, 2)
    penalty = gradient_penalty(lambda x: x @ weight, expert, sample)
    assert float(penalty.detach()) == pytest.approx((5 - 1) ** 2)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * (5 - 1) * weight.detach() / 5)
    assert float(r1_penalty(lambda x: x @ weight, expert).detach()) == pytest.approx(12.5)


def test_points_lie_between_the_two_sides() -> None:
    seen: list[Tensor] = []

    def score(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum(1)

    gradient_penalty(score, torch.ones(2, 3), torch.zeros(1000, 3))
    (points,) = seen
    assert points.shape == (1000, 3)
    assert torch.equal(points, points[:, :1].expand(-1, 3))  # on the line from one to the other
    assert 0 <= float(points.min()) < 0.05 < 0.95 < float(points.max()) <= 1
    assert float(points.mean()) == pytest.approx(0.5, abs=0.05)


def test_the_generator_decides_the_points() -> None:
    expert, sample = torch.randn(4, 3), torch.randn(4, 3)

    def draw(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(gradient_penalty(lambda x: x.square().sum(1), expert, sample, generator=generator).detach())

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_r1_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    weight = parameters["0.weight"]

    def penalty(value: Tensor) -> Tensor:
        def score(points: Tensor) -> Tensor:
            return torch.func.functional_call(network, {**parameters, "0.weight": value}, (points,))[:, 0]

        return r1_penalty(score, x)

    assert torch.autograd.gradcheck(penalty, (weight.detach().requires_grad_(),))


def test_a_flat_score_costs_one_and_has_a_finite_gradient() -> None:
    weight = torch.zeros(2, requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ weight, torch.randn(3, 2), torch.randn(3, 2))
    assert float(penalty.detach()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.isfinite(gradient).all()


def test_widths_must_agree() -> None:
    with pytest.raises(
        ValueError, match=re.escape("features have shapes (3, 2) and (3, 4); expected [E, F] and [K, F]")
    ):
        gradient_penalty(lambda x: x.sum(1), torch.zeros(3, 2), torch.zeros(3, 4))
