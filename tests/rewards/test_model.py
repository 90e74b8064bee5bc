import pytest
import torch

from irlfast.rewards import RewardModel, RewardModelConfig, pool


def batch(rows: int = 6, width: int = 9, hidden_size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(rows, width, hidden_size)
    lengths = torch.randint(1, width, (rows, 1))
    return hidden, torch.arange(width) < lengths


def model_for(**options) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(RewardModelConfig(**{"hidden_size": 5, **options}))


def test_a_linear_reward_is_the_product_with_its_weight():
    model = model_for(hidden_sizes=(), bias=False, pooling="mean")
    hidden, mask = batch()
    weight = model.network[0].weight[0]
    assert sum(p.numel() for p in model.parameters()) == 5
    torch.testing.assert_close(model(hidden, mask), pool(hidden, mask, "mean") @ weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_sizes": (7, 3), "activation": "relu", "pooling": ("last", "mean", "max")},
        {"layer_norm": True, "activation": "silu", "dropout": 0.3},
        {"output_bound": 0.05, "activation": "tanh"},
    ],
)
def test_more_padding_gives_the_same_bits_and_no_gradient(options):
    model = model_for(**options).eval()
    hidden, mask = batch()
    rewards = model(hidden, mask)
    assert rewards.shape == (6,)
    assert rewards.dtype == torch.float32
    wider = torch.nn.functional.pad(hidden, (0, 0, 2, 31), value=float("nan")).requires_grad_()
    wider_mask = torch.nn.functional.pad(mask, (2, 31))
    again = model(wider, wider_mask)
    assert torch.equal(rewards, again)
    again.sum().backward()
    assert wider.grad[~wider_mask].abs().max() == 0.0
    assert wider.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_bounded_reward_stays_inside_and_is_the_same_near_zero():
    free, bounded = model_for(hidden_sizes=()), model_for(hidden_sizes=(), output_bound=2.0)
    hidden, mask = batch()
    assert (bounded(1e3 * hidden, mask).abs() <= 2.0).all()
    torch.testing.assert_close(bounded(hidden, mask), 2 * torch.tanh(free(hidden, mask) / 2))


def test_gradient_in_float64():
    model = model_for(hidden_sizes=(3,), pooling=("last", "mean"), layer_norm=True, output_bound=3.0).double()
    hidden, mask = batch(rows=3, width=4)
    assert torch.autograd.gradcheck(lambda h: model(h, mask), hidden.double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_in_half_precision(dtype):
    model = model_for()
    hidden, mask = batch()
    assert torch.equal(model(hidden.to(dtype), mask), model(hidden.to(dtype).float(), mask))
    assert model.to(torch.bfloat16)(hidden, mask).dtype == torch.float32


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ValueError, match="hidden_states have width 4, the reward model was made for 5"):
        model_for()(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


def test_serve_normalises_without_dropout_or_gradient_and_keeps_the_modes():
    model = model_for(dropout=0.5).train()
    model.network[0].eval()
    hidden, mask = batch(rows=50)
    served = model.serve(hidden, mask, update=True)
    assert not served.requires_grad
    assert float(served.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(served.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert model.training
    assert model.network[2].training
    assert not model.network[0].training
    assert torch.equal(served, model.serve(hidden, mask))
    assert float(model.normalizer.count) == 50


def test_statistics_for_serving_never_change_the_raw_reward():
    model = model_for()
    hidden, mask = batch()
    raw = model(hidden, mask)
    model.normalizer.update(torch.tensor([100.0, 300.0]))
    assert torch.equal(model(hidden, mask), raw)
    assert torch.equal(model.serve(hidden, mask), ((raw.double() - 200) / 100).float())


def test_fit_feature_scale_standardises_the_pooled_features():
    hidden, mask = batch(rows=40)
    scales, shifts = torch.tensor([1e-3, 1.0, 1e4, 5.0, 1.0]), torch.tensor([3.0, -2.0, 1e5, 0.0, 7.0])
    hidden = hidden * scales + shifts
    hidden[..., 4] = 7.0  # never varies: centred, not divided by 0
    mask[3] = False
    model = model_for(pooling=("mean", "last"))
    model.fit_feature_scale(hidden, mask)
    features = model.features(hidden[mask.any(1)], mask[mask.any(1)]).double()
    assert features.shape == (39, 10)
    assert features.mean(0).abs().max() < 1e-2
    varying = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(features.std(0, correction=0)[varying], torch.ones(8).double(), atol=1e-3, rtol=0)
    assert features[:, [4, 9]].abs().max() == 0.0
    assert {"feature_mean", "feature_std"} <= model.state_dict().keys()


def test_fit_feature_scale_errors():
    model = model_for()
    with pytest.raises(ValueError, match="at least 2 rows with a non-empty mask, got 1"):
        model.fit_feature_scale(torch.zeros(2, 3, 5), torch.tensor([[True, True, True], [False, False, False]]))
    hidden = torch.zeros(2, 3, 5)
    hidden[1, 2, 4] = float("inf")
    with pytest.raises(ValueError, match="pooled feature 4 of row 1 is not finite"):
        model.fit_feature_scale(hidden, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be positive integers, got 0"),
        ({"hidden_sizes": (8, -1)}, "hidden_sizes must be positive integers, got -1"),
        ({"pooling": "first"}, "pooling 'first' is unknown"),
        ({"activation": "elu"}, "activation 'elu' is unknown"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"output_bound": 0.0}, "output_bound must be above 0"),
    ],
)
def test_configuration_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**{"hidden_size": 5, **options})


def test_a_reward_learns_to_tell_two_kinds_of_rows_apart():
    model = model_for(hidden_sizes=(16,), pooling="mean")
    hidden, mask = batch(rows=64)
    good = torch.arange(64) % 2 == 0
    hidden[good, :, 2] += 2.0
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        loss = torch.nn.functional.softplus(torch.where(good, -1, 1) * model(hidden, mask)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    rewards = model(hidden, mask)
    assert float((rewards[good][:, None] > rewards[~good]).float().mean()) > 0.99
