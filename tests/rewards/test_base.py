"""What every reward model on hidden states owes its callers, whatever its kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.rewards import BaseRewardModel, RewardModel, TokenRewards, TrajectoryRewardModel, load_reward_model

from .conftest import KINDS

Make = Callable[[str], BaseRewardModel]
Trajectories = tuple[Tensor, Tensor, Tensor]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_what_stands_on_padding_and_how_much_of_it_changes_nothing(
    make_reward: Make, trajectories: Trajectories, kind: str
) -> None:
    """Padding on either side, NaN on it: the same rewards to 1e-6 (attention may round differently) and no gradient."""
    reward = make_reward(kind)
    rewards = reward(*trajectories)
    assert rewards.shape == (5,)
    assert rewards.dtype == torch.float32
    hidden, mask, context = trajectories
    dirty = hidden.masked_fill(~context[..., None], float("nan"))
    for left, right in ((0, 0), (3, 0), (0, 40)):
        wider = torch.nn.functional.pad(dirty, (0, 0, left, right), value=float("nan")).requires_grad_()
        masks = [torch.nn.functional.pad(m, (left, right)) for m in (mask, context)]
        again = reward(wider, *masks)
        torch.testing.assert_close(again, rewards, rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(again.sum(), wider)
        assert gradient.isfinite().all()
        assert gradient[~masks[1]].abs().max() == 0.0
        assert (gradient[masks[0]].abs().sum() > 0).all()


@pytest.mark.parametrize(
    ("kind", "target", "broken"),
    [
        ("mlp last", "irlfast.rewards.head.pool", lambda states, mask, kind: states[:, -1].float()),
        ("linear mean", "irlfast.rewards.head.pool", lambda states, mask, kind: states.mean(1)),
        (
            "trajectory",
            "irlfast.rewards.trajectory.TrajectoryRewardModel._read",
            lambda self, mask, context: torch.ones_like(mask),
        ),
        ("trajectory", "irlfast.rewards.trajectory.pool", lambda states, mask, kind: states.mean(1)),
    ],
)
def test_reading_padding_would_be_noticed(
    make_reward: Make, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch, kind: str, target: str, broken: Any
) -> None:
    """The test above fails for a model that reads the last column, averages over all, or attends to padding."""
    reward = make_reward(kind)
    monkeypatch.setattr(target, broken)
    wider = [torch.nn.functional.pad(part, (*[0, 0] * (part.dim() - 2), 3, 5)) for part in trajectories]
    assert float((reward(*wider) - reward(*trajectories)).abs().max().detach()) > 1e-3


@every_kind
def test_rows_are_judged_alone(make_reward: Make, trajectories: Trajectories, kind: str) -> None:
    reward = make_reward(kind)
    whole = reward(*trajectories)
    for row in range(5):
        alone = reward(*(part[row : row + 1] for part in trajectories))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-6, atol=1e-6)


@every_kind
def test_token_rewards_make_up_the_reward(make_reward: Make, trajectories: Trajectories, kind: str) -> None:
    reward = make_reward(kind)
    _, mask, _ = trajectories
    tokens = reward.token_rewards(*trajectories)
    assert tokens.values.shape == mask.shape
    assert tokens.values[~mask].abs().max() == 0.0
    torch.testing.assert_close(tokens.total(mask), reward(*trajectories).detach(), rtol=0, atol=2e-6)
    above = TokenRewards(tokens.above(0.7, mask), tokens.kind)
    torch.testing.assert_close(above.total(mask), reward(*trajectories).detach() - 0.7, rtol=0, atol=2e-6)
    additive = {"linear mean": "mean", "trajectory": "mean", "trajectory sum": "sum", "multi": "sum"}
    assert tokens.kind == additive.get(kind, "attribution")


@every_kind
def test_a_saved_model_comes_back_in_its_class(
    make_reward: Make, trajectories: Trajectories, kind: str, tmp_path: Path
) -> None:
    reward = make_reward(kind)
    reward.save_pretrained(tmp_path)
    back = load_reward_model(tmp_path)
    assert type(back) is type(reward)
    assert back.config == reward.config
    assert not back.training
    assert torch.equal(back.serve(*trajectories), reward.serve(*trajectories))
    other = TrajectoryRewardModel if isinstance(reward, RewardModel) else RewardModel
    with pytest.raises(TypeError, match=rf"holds a {type(reward).__name__}, not a {other.__name__}"):
        other.from_pretrained(tmp_path)


@every_kind
def test_each_learns_to_tell_two_kinds_of_rows_apart(make_reward: Make, kind: str) -> None:
    torch.manual_seed(0)
    hidden, mask = torch.randn(48, 6, 6), torch.arange(6).expand(48, 6) < torch.randint(3, 7, (48, 1))
    good = torch.arange(48) % 2 == 0
    hidden[good, :, 2] += 2.0
    reward = make_reward(kind).train()
    optimiser = torch.optim.Adam(reward.parameters(), lr=0.02)
    for _ in range(60):
        loss = torch.nn.functional.softplus(torch.where(good, -1, 1) * reward.members(hidden, mask, mask)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    rewards = reward.eval()(hidden, mask, mask)
    assert float((rewards[good][:, None] > rewards[~good]).float().mean()) > 0.95


@pytest.mark.parametrize("kind", ["mlp", "trajectory", "multi", "ensemble"])
def test_hidden_states_that_do_not_fit_are_an_error_and_never_made_up(make_reward: Make, kind: str) -> None:
    """Regression: an earlier system swallowed the shape error and went on with states faked from a hash of the text."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="hidden_states have width 4, the reward model was made for 6"):
        make_reward(kind)(torch.zeros(2, 3, 4), mask, mask)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[B, S, H\], got \[2, 6\]"):
        make_reward(kind)(torch.zeros(2, 6), mask, mask)
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 4\], got \[2, 3\]"):
        make_reward(kind)(torch.zeros(2, 4, 6), mask, mask)


@pytest.mark.parametrize("kind", ["mlp last", "trajectory last"])
def test_the_last_token_is_the_responses_and_not_the_last_column(
    make_reward: Make, trajectories: Trajectories, kind: str
) -> None:
    """Regression: an earlier system pooled `hidden[:, -1]`, which is padding in all rows but the longest."""
    reward = make_reward(kind).requires_grad_(False)
    hidden, mask, context = trajectories
    rewards = reward(*trajectories)
    changed = hidden.clone()
    changed[1:, -1] = 7.0  # padding in every row but the first
    assert torch.equal(reward(changed, mask, context), rewards)
    for row, column in enumerate([8, 5, 7, 4, 6]):
        moved = hidden.clone()
        moved[row, column] += 1.0
        again = reward(moved, mask, context)
        assert float(again[row]) != pytest.approx(float(rewards[row]), abs=1e-4)
        assert torch.equal(again[torch.arange(5) != row], rewards[torch.arange(5) != row])


def test_a_model_without_token_rewards_says_so() -> None:
    class Flat(BaseRewardModel):
        def forward(self, *inputs: Tensor) -> Tensor:
            return torch.zeros(len(inputs[0]))

        def fit_feature_scale(self, *inputs: Tensor) -> None:
            return

    reward = Flat(None)
    assert not reward.has_token_rewards
    with pytest.raises(NotImplementedError, match="Flat has no rewards a token"):
        reward.token_rewards(torch.zeros(2))
    assert reward.components(torch.zeros(2)) == {}
    assert torch.equal(reward.members(torch.zeros(2)), torch.zeros(1, 2))
