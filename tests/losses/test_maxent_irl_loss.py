"""losses.maxent_irl_loss: value, gradient, groups, clipping, fused demonstrations, metrics, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.losses import maxent_irl_loss
from irlfast.ops import importance_weights

Batch = dict[str, Tensor]


def _batch(seed: int, *, prompts: int = 4, experts: int = 7, samples: int = 23) -> Batch:
    """Ragged groups with ids that are neither sorted nor contiguous; every prompt has at least one sample."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    ids = torch.randperm(50, generator=generator)[:prompts] - 25
    extra = torch.randint(0, prompts, (samples - prompts,), generator=generator)
    return {
        "expert_rewards": normal(experts),
        "sample_rewards": normal(samples) * 2,
        "log_proposal": normal(samples) - 3,
        "log_base": normal(samples) - 3,
        "expert_groups": ids[torch.randint(0, prompts, (experts,), generator=generator)],
        "sample_groups": ids[torch.cat([torch.randperm(prompts, generator=generator), extra])],
    }


def _reference(batch: Batch, beta: float) -> Tensor:
    """The formula, demonstration by demonstration."""
    terms = []
    for reward, group in zip(batch["expert_rewards"], batch["expert_groups"], strict=True):
        own = batch["sample_groups"] == group
        log_ratio = batch["sample_rewards"][own] / beta + batch["log_base"][own] - batch["log_proposal"][own]
        terms.append(-reward / beta + torch.log(torch.exp(log_ratio).sum() / own.sum()))
    return torch.stack(terms).mean()


def test_value_by_hand() -> None:
    # Ratios exp(r) / q are 1 / .5 = 2 and 3 / .25 = 12, so Z_hat = 7.
    result = maxent_irl_loss(
        torch.tensor([1.0, 2.0]),
        torch.tensor([0.0, math.log(3.0)]),
        torch.tensor([0.5, 0.25]).log(),
    )
    assert float(result.loss) == pytest.approx(-1.5 + math.log(7.0))
    assert float(result.metrics["log_normalizer"]) == pytest.approx(math.log(7.0))
    assert float(result.metrics["ess"]) == pytest.approx(1 / ((2 / 14) ** 2 + (12 / 14) ** 2))
    assert float(result.metrics["ess_relative"]) == pytest.approx(float(result.metrics["ess"]) / 2)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), prompts=st.integers(1, 6), beta=st.sampled_from([0.1, 1.0, 2.5]))
def test_against_the_formula_one_demonstration_at_a_time(seed: int, prompts: int, beta: float) -> None:
    batch = _batch(seed, prompts=prompts)
    torch.testing.assert_close(maxent_irl_loss(**batch, beta=beta).loss, _reference(batch, beta))


def test_exact_when_the_samples_enumerate_the_space() -> None:
    torch.manual_seed(0)
    reward = torch.randn(121, dtype=torch.float64)
    expert = torch.tensor([3, 5, 5])
    uniform = torch.full((121,), -math.log(121.0), dtype=torch.float64)
    got = maxent_irl_loss(reward[expert], reward, uniform).loss
    torch.testing.assert_close(got, -reward.log_softmax(0)[expert].mean())


@pytest.mark.parametrize(("clip", "temper"), [(None, 1.0), (0.8, 1.0), ((-9.0, 0.5), 1.0), (None, 0.5), (0.8, 0.3)])
def test_gradient_is_the_importance_weighted_one(clip: float | tuple[float, float] | None, temper: float) -> None:
    batch = _batch(1)
    beta = 0.7
    for name in ("expert_rewards", "sample_rewards"):
        batch[name].requires_grad_()
    result = maxent_irl_loss(**batch, beta=beta, clip=clip, temper=temper)
    torch.testing.assert_close(result.loss.detach(), _reference(batch, beta).detach())  # the value is never clipped
    result.loss.backward()
    log_target = batch["sample_rewards"] / beta + batch["log_base"]
    weights = importance_weights(
        log_target, batch["log_proposal"], groups=batch["sample_groups"], clip=clip, temper=temper
    ).weights
    share = torch.stack([(batch["expert_groups"] == g).double().mean() for g in batch["sample_groups"]])
    torch.testing.assert_close(batch["sample_rewards"].grad, share * weights / beta)
    torch.testing.assert_close(batch["expert_rewards"].grad, torch.full((7,), -1 / (7 * beta), dtype=torch.float64))


def test_gradcheck() -> None:
    batch = _batch(2)

    def loss(expert: Tensor, sample: Tensor) -> Tensor:
        return maxent_irl_loss(**{**batch, "expert_rewards": expert, "sample_rewards": sample}, centre=0.3, beta=2).loss

    inputs = (batch["expert_rewards"].requires_grad_(), batch["sample_rewards"].requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def _gradients(batch: Batch, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    expert = batch["expert_rewards"].clone().requires_grad_()
    sample = batch["sample_rewards"].clone().requires_grad_()
    loss = maxent_irl_loss(**{**batch, "expert_rewards": expert, "sample_rewards": sample}, **options).loss
    return (loss.detach(), *torch.autograd.grad(loss, (expert, sample)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), clip=st.sampled_from([None, 1.0]))
def test_a_constant_a_prompt_changes_neither_loss_nor_gradient(seed: int, clip: float | None) -> None:
    batch = _batch(seed)
    shift = {int(g): 100.0 * i for i, g in enumerate(batch["sample_groups"].unique())}
    moved = dict(batch)
    for side in ("expert", "sample"):
        per_row = torch.tensor([shift[int(g)] for g in batch[f"{side}_groups"]], dtype=torch.float64)
        moved[f"{side}_rewards"] = batch[f"{side}_rewards"] + per_row
    for a, b in zip(_gradients(batch, clip=clip), _gradients(moved, clip=clip), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    batch = _batch(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(23, generator=generator)
    shuffled = {k: v if k.startswith("expert") else v[order] for k, v in batch.items()}
    loss, expert, sample = _gradients(batch)
    shuffled_loss, shuffled_expert, shuffled_sample = _gradients(shuffled)
    torch.testing.assert_close(shuffled_loss, loss)
    torch.testing.assert_close(shuffled_expert, expert)
    torch.testing.assert_close(shuffled_sample, sample[order])


def test_samples_of_another_prompt_do_not_count() -> None:
    batch = _batch(3)
    stranger = {
        "sample_rewards": torch.tensor([1e6], dtype=torch.float64),
        "log_proposal": torch.zeros(1),
        "log_base": torch.zeros(1),
        "sample_groups": torch.tensor([999]),
    }
    joined = {k: torch.cat([v, stranger[k]]) if k in stranger else v for k, v in batch.items()}
    assert torch.equal(maxent_irl_loss(**joined).loss, maxent_irl_loss(**batch).loss)


def test_fused_demonstrations_leave_the_normaliser_unbiased() -> None:
    """The union of 40,000 uniform and 40,000 expert strings under its true mixture density, and under a wrong one."""
    torch.manual_seed(0)
    reward = 2 * torch.randn(50, dtype=torch.float64)
    log_p = reward.log_softmax(0)
    expert = torch.multinomial(log_p.exp(), 40_000, replacement=True)
    sample = torch.randint(0, 50, (40_000,))
    mixture = torch.logaddexp(log_p, torch.full((50,), -math.log(50.0), dtype=torch.float64)) - math.log(2.0)
    truth = float(reward.logsumexp(0))

    def normalizer(density: Tensor) -> float:
        result = maxent_irl_loss(reward[expert], reward[sample], density[sample], expert_log_proposal=density[expert])
        return float(result.metrics["log_normalizer"])

    assert normalizer(mixture) == pytest.approx(truth, abs=0.01)
    assert abs(normalizer(torch.full_like(mixture, -math.log(50.0))) - truth) > 0.3


@pytest.mark.parametrize("clip", [None, 0.7])
def test_fused_demonstrations_get_the_gradient_of_both_their_terms(clip: float | None) -> None:
    batch = _batch(6)
    expert_log_proposal, expert_log_base = torch.linspace(-3, -1, 7), torch.linspace(-2, -4, 7)
    beta = 1.7
    loss, expert, sample = _gradients(
        batch, expert_log_proposal=expert_log_proposal, expert_log_base=expert_log_base, beta=beta, clip=clip
    )
    weights, normalizers, _ = importance_weights(
        torch.cat([batch["sample_rewards"], batch["expert_rewards"]]) / beta
        + torch.cat([batch["log_base"], expert_log_base]),
        torch.cat([batch["log_proposal"], expert_log_proposal]),
        groups=torch.cat([batch["sample_groups"], batch["expert_groups"]]),
        clip=clip,
    )
    share = torch.stack(
        [
            (batch["expert_groups"] == g).double().mean()
            for g in torch.cat([batch["sample_groups"], batch["expert_groups"]])
        ]
    )
    torch.testing.assert_close(torch.cat([sample, expert + 1 / (7 * beta)]), share * weights / beta)
    order = torch.searchsorted(batch["sample_groups"].unique(), batch["expert_groups"])
    torch.testing.assert_close(loss, (normalizers[order] - batch["expert_rewards"] / beta).mean())


def test_centre_is_the_mean_square_of_both_sides() -> None:
    expert, sample = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0, -4.0])
    plain = maxent_irl_loss(expert, sample, torch.zeros(3)).loss
    centred = maxent_irl_loss(expert, sample, torch.zeros(3), centre=0.1).loss
    assert float(centred - plain) == pytest.approx(0.1 * (4 / 2 + 18 / 3) / 2)


def test_label_smoothing_moves_a_share_of_the_target_to_the_samples() -> None:
    batch = _batch(5)
    plain, smooth = maxent_irl_loss(**batch), maxent_irl_loss(**batch, label_smoothing=0.2)
    expert, sample = batch["expert_rewards"], batch["sample_rewards"]
    others = torch.stack([sample[batch["sample_groups"] == g].mean() for g in batch["expert_groups"]])
    torch.testing.assert_close(smooth.loss - plain.loss, 0.2 * (expert - others).mean())
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5; expected a share in \[0, 0\.5\)"):
        maxent_irl_loss(**batch, label_smoothing=0.5)


def test_metrics_by_hand() -> None:
    metrics = maxent_irl_loss(
        torch.tensor([3.0, -5.0]),
        torch.tensor([1.0, 3.0, 4.0, -6.0]),
        torch.zeros(4),
        expert_groups=torch.tensor([1, 0]),
        sample_groups=torch.tensor([1, 1, 1, 0]),
    ).metrics
    assert float(metrics["expert_reward"]) == -1.0
    assert float(metrics["sample_reward"]) == 0.5
    assert float(metrics["margin"]) == -1.5
    assert float(metrics["max_abs_reward"]) == 6.0
    # Prompt 1: 3 beats 1, ties 3, loses to 4. Prompt 0: -5 beats -6. Four pairs, 2.5 won.
    assert float(metrics["auc"]) == pytest.approx(2.5 / 4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16))
def test_auc_counts_pairs_within_a_prompt(seed: int) -> None:
    batch = _batch(seed)
    for side in ("expert", "sample"):
        batch[f"{side}_rewards"] = batch[f"{side}_rewards"].round()  # so that there are ties
    same = batch["expert_groups"][:, None] == batch["sample_groups"][None]
    difference = batch["expert_rewards"][:, None] - batch["sample_rewards"][None]
    want = ((difference > 0).double() + 0.5 * (difference == 0).double())[same].mean()
    torch.testing.assert_close(maxent_irl_loss(**batch).metrics["auc"], want)


def test_metrics_are_detached_scalars_and_densities_get_no_gradient() -> None:
    batch = _batch(4)
    for name in ("expert_rewards", "sample_rewards", "log_proposal", "log_base"):
        batch[name].requires_grad_()
    result = maxent_irl_loss(**batch)
    assert all(m.dim() == 0 and not m.requires_grad for m in result.metrics.values())
    result.loss.backward()
    assert batch["log_proposal"].grad is None
    assert batch["log_base"].grad is None


def test_low_precision_rewards_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    expert, sample = torch.randn(64).bfloat16(), torch.randn(512).bfloat16()
    got = maxent_irl_loss(expert, sample, torch.zeros(512)).loss
    assert got.dtype == torch.float32
    assert torch.equal(got, maxent_irl_loss(expert.float(), sample.float(), torch.zeros(512)).loss)


def test_errors() -> None:
    one, three = torch.zeros(1), torch.zeros(3)
    with pytest.raises(ValueError, match=r"1 group\(s\) without samples in sample_groups: 7; sample each"):
        maxent_irl_loss(one, three, three, expert_groups=torch.tensor([7]), sample_groups=torch.tensor([1, 1, 2]))
    with pytest.raises(ValueError, match="expert_groups and sample_groups go together"):
        maxent_irl_loss(one, three, three, sample_groups=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"log_proposal has shape \(1,\); expected that of sample_rewards, \(3,\)"):
        maxent_irl_loss(one, three, one)
    with pytest.raises(ValueError, match=r"expert_rewards has shape \(0,\); expected a vector of at least one"):
        maxent_irl_loss(torch.zeros(0), three, three)
    with pytest.raises(ValueError, match=r"sample_rewards\[1\] is inf; every reward must be finite"):
        maxent_irl_loss(one, torch.tensor([0.0, torch.inf]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"expert_groups has shape \(2,\); expected one id a row, \(1,\)"):
        maxent_irl_loss(one, three, three, expert_groups=torch.tensor([0, 0]), sample_groups=torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="beta is 0"):
        maxent_irl_loss(one, three, three, beta=0)
    with pytest.raises(ValueError, match="centre is -1"):
        maxent_irl_loss(one, three, three, centre=-1)
    with pytest.raises(ValueError, match="expert_log_base is used only with expert_log_proposal"):
        maxent_irl_loss(one, three, three, expert_log_base=one)
    with pytest.raises(ValueError, match="give both log_base and expert_log_base, or neither"):
        maxent_irl_loss(one, three, three, log_base=three, expert_log_proposal=one)
    with pytest.raises(TypeError, match=r"sample_rewards has dtype torch.int64"):
        maxent_irl_loss(one, torch.zeros(3, dtype=torch.int64), three)
