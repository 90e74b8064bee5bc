import pytest
import torch

from irlfast.rewards import create_reward_model


def test_heads_are_added_with_their_weights_and_named(make_reward, trajectories):
    reward = make_reward("multi")
    parts = reward.components(*trajectories)
    assert list(parts) == ["linear", "path"]
    torch.testing.assert_close(reward(*trajectories), 2.0 * parts["linear"] - 0.5 * parts["path"])


def test_members_disagree_and_learn_apart(make_reward, trajectories):
    reward = make_reward("ensemble")
    members = reward.members(*trajectories)
    assert members.shape == (3, 5)
    parts = reward.components(*trajectories)
    torch.testing.assert_close(parts["disagreement"], members.std(0, correction=0))
    torch.testing.assert_close(reward(*trajectories), members.mean(0))
    # A loss on the rows of `members` gives each member its own gradient.
    (gradient,) = torch.autograd.grad(members[1].sum(), [reward.parts["member1"].network[0].weight])
    assert gradient.abs().sum() > 0
    others = reward.parts["member0"].network[0].weight
    (gradient,) = torch.autograd.grad(reward.members(*trajectories)[1].sum(), [others])
    assert gradient.abs().max() == 0.0


def test_a_penalty_takes_the_disagreement_off(make_reward, trajectories):
    options = {"options": {"hidden_size": 6}, "members": 3, "penalty": 1.5}
    torch.manual_seed(0)
    careful = create_reward_model(options, "ensemble")
    members = careful.members(*trajectories)
    torch.testing.assert_close(careful(*trajectories), members.mean(0) - 1.5 * members.std(0, correction=0))
    assert not careful.has_token_rewards
    with pytest.raises(NotImplementedError, match=r"an ensemble with penalty = 1\.5 has no rewards a token"):
        careful.token_rewards(*trajectories)


def test_disagreement_is_larger_where_the_members_saw_nothing():
    torch.manual_seed(0)
    hidden = torch.randn(64, 3, 6)
    mask = torch.ones(64, 3, dtype=torch.bool)
    target = hidden[:, :, 0].mean(1)
    reward = create_reward_model({"options": {"hidden_size": 6, "pooling": "mean", "hidden_sizes": (16,)}}, "ensemble")
    optimiser = torch.optim.Adam(reward.parameters(), lr=0.02)
    for _ in range(150):
        loss = (reward.members(hidden, mask, mask) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    reward.requires_grad_(False)
    near = reward.components(hidden, mask, mask)["disagreement"].mean()
    far = reward.components(hidden + 6.0, mask, mask)["disagreement"].mean()
    assert float(far) > 3 * float(near)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("multi", {"parts": []}, "at least one head, each with a name of its own, got"),
        ("multi", {"parts": [{"name": "a", "options": {"hidden_size": 6}}] * 2}, r"got \['a', 'a'\]"),
        ("multi", {"parts": [{"name": "a b", "options": {"hidden_size": 6}}]}, "name 'a b' must be letters"),
        ("multi", {"parts": [{"name": "a", "options": {}}]}, "the options of a: .* needs hidden_size"),
        ("multi", {"parts": [{"name": "a", "model_type": "multi"}]}, "the type of a is 'multi', expected 'mlp'"),
        ("multi", {"parts": [{"name": "a", "weight": float("nan")}]}, "weight of a must be finite"),
        ("ensemble", {"options": {"hidden_size": 6}, "members": 1}, "members must be at least 2 to disagree, got 1"),
        ("ensemble", {"options": {"hidden_size": 6}, "penalty": -1.0}, "penalty must be a number of at least 0"),
        ("ensemble", {"options": {}, "member_type": "backbone"}, "the type of member0 is 'backbone'"),
    ],
)
def test_configuration_errors(model_type, options, message):
    with pytest.raises(ValueError, match=message):
        create_reward_model(options, model_type)
