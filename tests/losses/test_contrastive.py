"""contrastive_loss: cross-entropy of the demonstration in a line-up of its prompt's samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, softplus

from irlfast.losses import RewardBatch, contrastive_loss, make_objective


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_value_is_cross_entropy_of_the_line_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expert, sample = (torch.randn(n, dtype=torch.float64, generator=generator) * 5 for n in (4, 9))
    expert_groups, sample_groups = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2])
    want = []
    for reward, prompt in zip(expert, expert_groups, strict=True):
        line_up = torch.cat([reward[None], sample[sample_groups == prompt]])
        want.append(cross_entropy(line_up[None], torch.tensor([0])))
    got = contrastive_loss(expert, sample, expert_groups=expert_groups, sample_groups=sample_groups)
    torch.testing.assert_close(got.loss, torch.stack(want).mean())


def test_one_sample_is_the_papers_pair() -> None:
    expert, sample = torch.tensor([1.0]), torch.tensor([-0.5])
    assert float(contrastive_loss(expert, sample).loss) == pytest.approx(float(softplus(sample - expert)))


def test_gradcheck_and_a_constant_a_prompt_changes_nothing() -> None:
    torch.manual_seed(0)
    expert, sample = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (2, 5))
    groups = {"expert_groups": torch.tensor([0, 1]), "sample_groups": torch.tensor([0, 1, 1, 0, 1])}
    assert torch.autograd.gradcheck(lambda e, s: contrastive_loss(e, s, **groups).loss, (expert, sample))
    moved = contrastive_loss(
        expert + 100 * groups["expert_groups"], sample + 100 * groups["sample_groups"], **groups
    ).loss
    torch.testing.assert_close(moved, contrastive_loss(expert, sample, **groups).loss, rtol=0, atol=1e-9)


def test_objective_and_metrics_by_hand() -> None:
    batch = RewardBatch(
        expert_rewards=torch.tensor([3.0, 0.0]),
        sample_rewards=torch.tensor([1.0, 5.0, 2.0]),
        expert_groups=torch.tensor([0, 1]),
        sample_groups=torch.tensor([0, 1, 0]),
    )
    metrics = make_objective("contrastive").loss(batch).metrics
    assert float(metrics["accuracy"]) == 0.5
    assert float(metrics["auc"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no option 'label_smoothing'; its options: none"):
        make_objective("contrastive", {"label_smoothing": 0.1})
