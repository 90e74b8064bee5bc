"""RewardBatch and the registry: what fits, which pairs there are, and errors that list what is known."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast import losses
from irlfast.losses import Objective, RewardBatch, RewardLoss, registry
from irlfast.losses.maxent import mixture_density


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names registered in a test are forgotten after it."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))


@settings(deadline=None, max_examples=40)
@given(
    experts=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    extra=st.lists(st.integers(0, 4), max_size=8),
    seed=st.integers(0, 99),
)
def test_pairs_are_every_demonstration_with_every_sample_of_its_prompt(
    experts: list[int], extra: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([*experts, *extra])[torch.randperm(len(experts) + len(extra), generator=generator)]
    batch = RewardBatch(
        expert_rewards=torch.arange(float(len(experts))),
        sample_rewards=100 + torch.arange(float(len(groups))),
        expert_groups=torch.tensor(experts),
        sample_groups=groups,
    )
    chosen, rejected = batch.pairs()
    expected = [
        (float(i), 100.0 + k)
        for i, prompt in enumerate(experts)
        for k, other in enumerate(groups.tolist())
        if prompt == other
    ]
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == expected


def test_pairs_without_groups_are_all_pairs() -> None:
    batch = RewardBatch(expert_rewards=torch.tensor([1.0, 2.0]), sample_rewards=torch.tensor([3.0, 4.0]))
    assert batch.pairs()[0].tolist() == [1, 1, 2, 2]
    assert batch.pairs()[1].tolist() == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_rewards": torch.zeros(0)}, "expert_rewards has shape (0,); expected a vector"),
        ({"sample_rewards": torch.tensor([0.0, torch.nan])}, "sample_rewards[1] is nan; every reward must be finite"),
        ({"log_proposal": torch.zeros(3)}, "log_proposal has shape (3,); expected that of sample_rewards, (2,)"),
        ({"expert_logprobs": torch.zeros(2)}, "expert_logprobs has shape (2,); expected that of expert_rewards, (1,)"),
        ({"beta": 0.0}, "beta is 0.0; expected a positive temperature"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardBatch(**{"expert_rewards": torch.zeros(1), "sample_rewards": torch.zeros(2), **change})


def test_a_missing_field_is_named_with_the_objective_that_needs_it() -> None:
    batch = RewardBatch(expert_rewards=torch.zeros(1), sample_rewards=torch.zeros(2))
    with pytest.raises(ValueError, match="maxent needs log_proposal: give it to RewardBatch"):
        losses.make_objective("maxent").loss(batch)


def test_unknown_names_and_options_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"objective 'maxnet' is unknown; known are maxent.*register_objective"):
        losses.make_objective("maxnet")
    with pytest.raises(
        ValueError, match=r"'maxent' has no option 'weigth_clip'; its options: weight_clip, weight_temp"
    ):
        losses.make_objective("maxent", {"weigth_clip": 1.0})


@pytest.mark.usefixtures("own_names")
def test_a_registered_objective_is_made_by_its_name() -> None:
    @losses.register_objective("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Objective):
        scale: float = 1.0

        def loss(self, batch: RewardBatch) -> RewardLoss:
            return RewardLoss(self.scale * batch.sample_rewards.mean(), {})

    made = losses.make_objective("mine", {"scale": 2.0})
    batch = RewardBatch(expert_rewards=torch.zeros(1), sample_rewards=torch.tensor([1.0, 3.0]))
    assert float(made.loss(batch).loss) == 4.0
    assert "mine" in losses.objective_names()
    with pytest.raises(ValueError, match="objective 'mine' is Mine already: choose another name"):
        losses.register_objective("mine")(Mine)
    with pytest.raises(TypeError, match=r"is no dataclass that derives from irlfast\.losses\.Objective"):
        losses.register_objective("other")(object)  # type: ignore[type-var]


def test_fused_demonstrations_stand_under_the_mixture_of_sampler_and_model() -> None:
    """Two prompts, 2 and 1 demonstrations, 3 and 1 samples: log (E p + K q) / (E + K) with p = b exp(r / beta) / Z."""
    torch.manual_seed(0)
    beta, experts, samples = 0.5, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1, 0])
    e, s = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    e_base, s_base, e_q, s_q = (torch.randn(n, dtype=torch.float64) for n in (3, 4, 3, 4))
    batch = RewardBatch(
        expert_rewards=e,
        sample_rewards=s,
        expert_groups=experts,
        sample_groups=samples,
        log_proposal=s_q,
        log_base=s_base,
        expert_log_base=e_base,
        expert_logprobs=e_q,
        beta=beta,
    )
    got_samples, got_experts = mixture_density(batch)
    for rewards, base, q, groups, got in (
        (s, s_base, s_q, samples, got_samples),
        (e, e_base, e_q, experts, got_experts),
    ):
        for i, prompt in enumerate(groups.tolist()):
            mine = samples == prompt
            z = torch.exp(s[mine] / beta + s_base[mine] - s_q[mine]).mean()
            n, k = int((experts == prompt).sum()), int(mine.sum())
            p = torch.exp(rewards[i] / beta + base[i]) / z
            torch.testing.assert_close(got[i], torch.log((n * p + k * torch.exp(q[i])) / (n + k)))
    objective = losses.make_objective("maxent", {"fuse_demonstrations": True})
    want = losses.maxent_irl_loss(
        e,
        s,
        got_samples,
        log_base=s_base,
        expert_groups=experts,
        sample_groups=samples,
        beta=beta,
        expert_log_proposal=got_experts,
        expert_log_base=e_base,
    )
    torch.testing.assert_close(objective.loss(batch).loss, want.loss)
    assert {"expert_logprobs", "expert_log_base"} <= objective.needs
    assert not objective.takes_replay
