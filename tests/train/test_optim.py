"""Optimizer: the schedule by hand, clipping, refusal of non-finite gradients, state."""

import io
import math

import pytest
import torch

from irlfast.train import OptimizerConfig
from irlfast.train.optim import Optimizer, gradient_norm, learning_rate


def module_with(values: list[float]) -> torch.nn.Linear:
    module = torch.nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([values]))
    return module


def set_gradient(module: torch.nn.Linear, values: list[float]) -> None:
    module.weight.grad = torch.tensor([values])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (
            "cosine",
            [0.5, 1.0, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2],
        ),
    ],
)
def test_schedule_by_hand(schedule: str, expected: list[float]) -> None:
    """Two steps of warm-up, then five that end at a fifth of the peak, which is 1."""
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule=schedule, final_lr_fraction=0.2)
    assert [learning_rate(config, step, 7) for step in range(7)] == pytest.approx(expected)


def test_schedule_stays_at_its_end_and_survives_short_runs() -> None:
    config = OptimizerConfig(lr=2.0, schedule="linear", final_lr_fraction=0.25)
    assert learning_rate(config, 9, 10) == learning_rate(config, 50, 10) == pytest.approx(0.5)
    assert learning_rate(config, 0, 1) == 2.0
    longer_than_the_run = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    assert learning_rate(longer_than_the_run, 1, 2) == 1.0
    assert learning_rate(longer_than_the_run, 4, 2) == 2.0


def test_first_step_is_that_of_adamw_by_hand() -> None:
    """Bias-corrected, the first moments are g and g^2: the step is lr * g / (|g| + eps), and decay is decoupled."""
    module = module_with([1.0, -2.0])
    optimizer = Optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5, max_grad_norm=0.0), 10)
    set_gradient(module, [3.0, -0.01])
    norm, lr = optimizer.step()
    assert norm == pytest.approx(math.hypot(3.0, 0.01))
    assert lr == 0.1
    expected = [1.0 * (1 - 0.1 * 0.5) - 0.1, -2.0 * (1 - 0.1 * 0.5) + 0.1]
    assert module.weight[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, [0.6, 0.8]), (5.0, [3.0, 4.0]), (4.999, [2.9994, 3.9992]), (0.0, [3.0, 4.0])]
)
def test_gradients_are_scaled_to_the_limit_and_only_down(limit: float, expected: list[float]) -> None:
    module = module_with([0.0, 0.0])
    optimizer = Optimizer(module, OptimizerConfig(max_grad_norm=limit), 10)
    set_gradient(module, [3.0, 4.0])
    norm, _ = optimizer.step()
    assert norm == pytest.approx(5.0)  # reported before clipping
    assert module.weight.grad is not None
    assert module.weight.grad[0].tolist() == pytest.approx(expected)


def test_gradient_norm_is_that_of_all_parameters_together() -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    assert float(gradient_norm(module.parameters())) == pytest.approx(3.0)  # the bias has none
    module.bias.grad = torch.tensor([0.0, 4.0])
    assert float(gradient_norm(module.parameters())) == pytest.approx(5.0)
    assert float(gradient_norm([])) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    module = module_with([1.0, 2.0])
    optimizer = Optimizer(module, OptimizerConfig(), 10)
    set_gradient(module, [1.0, 1.0])
    optimizer.step()
    weights, state = module.weight.detach().clone(), optimizer.state_dict()["adamw"]["state"][0]["exp_avg"].clone()
    set_gradient(module, [1.0, bad])
    with pytest.raises(FloatingPointError, match=r"norm is (nan|inf) at optimiser step 1; .*left as they were"):
        optimizer.step()
    assert torch.equal(module.weight, weights)
    assert torch.equal(optimizer.state_dict()["adamw"]["state"][0]["exp_avg"], state)
    assert optimizer.step_count == 1


def test_state_round_trip_goes_on_bitwise() -> None:
    config = OptimizerConfig(lr=0.1, warmup_steps=2, schedule="cosine", weight_decay=0.1)
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).tolist()
    straight = module_with([1.0, 2.0, 3.0])
    optimizer = Optimizer(straight, config, 6)
    for step, gradient in enumerate(gradients):
        if step == 3:
            saved, weights = optimizer.state_dict(), straight.weight.detach().clone()
            # Tensors in a state dict are the optimiser's own: a checkpoint writes them before they move on.
            saved = torch.load(_roundtrip(saved), weights_only=True)
        set_gradient(straight, gradient)
        optimizer.step()
    resumed = module_with(weights[0].tolist())
    second = Optimizer(resumed, config, 6)
    second.load_state_dict(saved)
    assert second.step_count == 3
    for gradient in gradients[3:]:
        set_gradient(resumed, gradient)
        second.step()
    assert torch.equal(resumed.weight, straight.weight)


def _roundtrip(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_frozen_parameters_are_left_alone_and_nothing_to_train_is_an_error() -> None:
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    bias = module.bias.clone()
    optimizer = Optimizer(module, OptimizerConfig(weight_decay=0.5), 10)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(module.bias, bias)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient: nothing to train"):
        Optimizer(module, OptimizerConfig(), 10)
