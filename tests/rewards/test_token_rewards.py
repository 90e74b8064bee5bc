"""Token rewards against what they are defined as, worked out in another way."""

import pytest
import torch

from irlfast.rewards import RewardModel, RewardModelConfig, TrajectoryRewardModel, create_reward_model
from irlfast.rewards.head import _integrated_gradient

from .conftest import KINDS


def test_terms_of_a_linear_reward_on_mean_states(make_reward, trajectories):
    reward = make_reward("linear mean")
    hidden, mask, _ = trajectories
    weight, bias = reward.network[0].weight[0], reward.network[0].bias
    terms = (hidden - reward.feature_mean) / reward.feature_std @ weight + bias
    torch.testing.assert_close(reward.token_rewards(*trajectories).values[mask], terms[mask].detach())


def test_prefixes_are_what_the_reward_of_shorter_responses_differs_by(make_reward, trajectories):
    """For a reward on the last state: r(y_<=t) - r(y_<t) by scoring every prefix, from the average features on."""
    reward = make_reward("mlp last")
    hidden, mask, _ = trajectories
    values = reward.token_rewards(*trajectories).values
    average = float(reward.head(torch.zeros(6)).detach())
    for row in range(5):
        before = average
        columns = mask[row].nonzero()[:, 0].tolist()
        for column in columns:
            prefix = mask[row : row + 1] & (torch.arange(9) <= column)
            now = float(reward(hidden[row : row + 1], prefix).detach())
            assert float(values[row, column]) == pytest.approx(now - before + average / len(columns), abs=1e-6)
            before = now


@pytest.mark.parametrize("pooling", ["mean", "max", ("mean", "max")])
def test_attributions_of_a_linear_reward_are_its_terms(pooling):
    """With a linear head integrated gradients are exact: w_f (h_tf - mean_f) / std_f, shared as the pooling shares."""
    torch.manual_seed(0)
    # A bound too high to bend the reward, so that the model does not count as additive.
    config = RewardModelConfig(hidden_size=4, hidden_sizes=(), pooling=pooling, output_bound=1e6)
    reward = RewardModel(config).double()
    hidden, mask = torch.randn(3, 5, 4).double(), torch.arange(5).expand(3, 5) < torch.tensor([[5], [3], [1]])
    reward.fit_feature_scale(hidden, mask)
    got = reward.token_rewards(hidden, mask)
    assert got.kind == "attribution"
    weight, bias = reward.network[0].weight[0].detach(), float(reward.network[0].bias.detach())
    want = torch.zeros(3, 5).double()
    kinds = (pooling,) if isinstance(pooling, str) else pooling
    for index, kind in enumerate(kinds):
        part = slice(4 * index, 4 * index + 4)
        mean, std, w = reward.feature_mean[part], reward.feature_std[part], weight[part]
        for row in range(3):
            length = int(mask[row].sum())
            for feature in range(4):
                states = (hidden[row, :length, feature] - mean[feature]) / std[feature] * w[feature]
                if kind == "mean":
                    want[row, :length] += states / length
                else:
                    winner = int(hidden[row, :length, feature].argmax())
                    want[row, winner] += states[winner]
            want[row, :length] += bias / length / len(kinds)
    torch.testing.assert_close(got.values, want, rtol=0, atol=1e-9)


def test_the_quadrature_integrates_a_curved_function():
    points = torch.tensor([[0.5, -2.0], [3.0, 1.0]], dtype=torch.float64)
    gradient = _integrated_gradient(lambda z: torch.tanh(z).sum(-1) + (z**3).sum(-1), points)
    torch.testing.assert_close(gradient * points, torch.tanh(points) + points**3, rtol=0, atol=1e-9)


def test_a_trajectory_reward_of_a_token_knows_nothing_of_what_follows(make_reward, trajectories):
    reward = make_reward("trajectory")
    hidden, mask, context = trajectories
    values = reward.token_rewards(*trajectories).values
    changed = hidden.clone()
    changed[:, 6:] += 1.0
    again = reward.token_rewards(changed, mask, context).values
    torch.testing.assert_close(again[:, :6], values[:, :6], rtol=0, atol=1e-6)
    assert (again[:, 6:] - values[:, 6:])[mask[:, 6:]].abs().min() > 1e-4


def test_the_prompt_is_read_or_not_as_the_configuration_says(make_reward, trajectories):
    hidden, mask, context = trajectories
    changed = hidden.masked_fill((context & ~mask)[..., None], 5.0)
    reading, blind = make_reward("trajectory"), make_reward("trajectory sum")
    assert (reading(changed, mask, context) - reading(*trajectories)).abs().min() > 1e-4
    assert torch.equal(blind(changed, mask, context), blind(*trajectories))
    assert torch.equal(blind(hidden, mask), blind(*trajectories))
    with pytest.raises(ValueError, match="context_mask is missing: this model reads the prompt too"):
        reading(hidden, mask)


def test_order_matters_to_a_trajectory(make_reward, trajectories):
    """Mean pooling forgets the order of the states; the trajectory model does not."""
    hidden, mask, context = trajectories
    swapped = hidden.clone()
    swapped[:, [4, 5]] = hidden[:, [5, 4]]  # rows 0 and 2 have both in their response
    reward = make_reward("trajectory")
    assert (reward(swapped, mask, context) - reward(*trajectories))[[0, 2]].abs().min() > 1e-5
    torch.testing.assert_close(
        make_reward("linear mean")(swapped, mask, context)[[0, 2]], make_reward("linear mean")(*trajectories)[[0, 2]]
    )


def test_gradients_of_a_trajectory_in_float64(trajectories):
    model = create_reward_model({**KINDS["trajectory"][1], "output_bound": 2.0}, "trajectory")
    assert isinstance(model, TrajectoryRewardModel)
    hidden, mask, context = (part[:2, :7] for part in trajectories)
    model.double()
    assert torch.autograd.gradcheck(lambda h: model(h, mask, context), hidden.double().requires_grad_())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10}, "width = 10 must be a multiple of 2 x heads = 8"),
        ({"layers": 0}, "layers must be positive integers, got 0"),
        ({"reduction": "max"}, "reduction 'max' is unknown"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"output_bound": -1.0}, "output_bound must be above 0"),
    ],
)
def test_configuration_errors_of_a_trajectory(options, message):
    with pytest.raises(ValueError, match=message):
        create_reward_model({"hidden_size": 6, **options}, "trajectory")
