import logging
from dataclasses import replace

import pytest
import torch

from irlfast.eval import toy
from irlfast.rollout import Rollouts, SamplingParams, Sequences, TransformersEngine
from irlfast.train import BiLevelConfig, PolicyConfig
from irlfast.train.experience import Scored
from irlfast.train.mismatch import EDGES, MismatchWatch, gap_metrics, version_lag
from irlfast.train.policy_update import PolicyUpdate


def rollouts(model_logprobs: list[list[float]], versions: list[list[int]] | None = None) -> Rollouts:
    base = Sequences.from_token_lists([[5], [5, 6]], [[7, 8, 2], [9, 2]], 0)
    logprobs = torch.tensor(model_logprobs)
    return Rollouts(
        input_ids=base.input_ids, attention_mask=base.attention_mask, response_mask=base.response_mask,
        groups=base.groups, sampler_logprobs=logprobs, model_logprobs=logprobs, finish_reasons=("stop", "stop"),
        versions=None if versions is None else torch.tensor(versions),
    )  # fmt: skip


def test_gap_is_of_response_tokens_alone() -> None:
    sampled = rollouts([[0.0, -1.0, -2.0, -3.0], [0.0, 0.0, -1.0, -1.0]])
    trainer = torch.tensor([[9.0, -1.0, -2.5, -3.0], [9.0, 9.0, -1.05, -1.0]])
    metrics = gap_metrics(trainer, sampled)
    assert metrics["gap_mean"] == pytest.approx(0.55 / 5)
    assert metrics["gap_max"] == pytest.approx(0.5)
    shares = [metrics[f"gap_above_{edge:g}"] for edge in EDGES]
    assert shares == pytest.approx([0.4, 0.4, 0.4, 0.4, 0.2, 0.0])


def test_lag_counts_versions_token_by_token() -> None:
    zeros = [[0.0] * 4] * 2
    assert version_lag(rollouts(zeros, [[0, 3, 3, 4], [0, 0, 5, 5]]), 5) == {"lag_mean": 1.0, "lag_max": 2.0}
    assert version_lag(rollouts(zeros), 5) == {}


def test_a_gap_that_stays_is_no_news_and_one_that_grows_is(caplog: pytest.LogCaptureFixture) -> None:
    watch = MismatchWatch()
    with caplog.at_level(logging.WARNING, logger="irlfast"):
        assert all(watch.see({"gap_mean": 2e-3, "gap_max": 0.1}) is None for _ in range(10))
        text = watch.see({"gap_mean": 7e-3, "gap_max": 0.3})
    assert text is not None
    assert "differ from the sampler's by 0.007 nats a token, usually 0.002 (largest 0.3)" in text
    assert "policy.tis_cap" in text
    assert "policy.icepop_band" in text
    assert "versions old" not in text
    assert [record.message for record in caplog.records] == [text]
    assert watch.see({"gap_mean": 9e-3, "gap_max": 0.3}) is None  # said once in a window


def test_growth_below_what_matters_is_not_worth_a_word_and_a_large_gap_always_is() -> None:
    watch = MismatchWatch()
    assert all(watch.see({"gap_mean": 1e-6, "gap_max": 1e-5}) is None for _ in range(10))
    assert watch.see({"gap_mean": 9e-4, "gap_max": 1e-2}) is None
    text = MismatchWatch().see({"gap_mean": 0.06, "gap_max": 2.0, "lag_mean": 1.5, "lag_max": 2.0})
    assert text is not None
    assert "The samples are 1.5 versions old on average" in text
    assert "lower overlap" in text
    assert MismatchWatch().see({"loss": 1.0}) is None


def test_a_nan_gap_is_not_passed_over() -> None:
    assert MismatchWatch().see({"gap_mean": float("nan"), "gap_max": float("nan")}) is not None


def test_samples_drawn_ahead_are_corrected_for_unless_told_how() -> None:
    def cap(**policy: object) -> float | None:
        config = BiLevelConfig(overlap=1, policy=PolicyConfig(**policy))  # type: ignore[arg-type]
        return PolicyUpdate(toy.ToyPolicy(), config).tis_cap

    assert cap() == 2.0
    assert cap(tis_cap=5.0) == 5.0
    assert cap(icepop_band=(0.5, 5.0)) is None
    assert PolicyUpdate(toy.ToyPolicy(), BiLevelConfig()).tis_cap is None
    with pytest.raises(ValueError, match=r"policy.icepop_band = \(1.5, 5.0\), expected 0 <= low < 1 < high"):
        PolicyConfig(icepop_band=(1.5, 5.0))
    with pytest.raises(ValueError, match="overlap = -1"):
        BiLevelConfig(overlap=-1)


def test_a_sampler_that_is_off_is_measured_and_its_worst_tokens_left_out() -> None:
    """One token of four is reported as if e^3 times likelier: its ratio leaves the band, and the gap shows it."""
    torch.manual_seed(0)
    policy = toy.ToyPolicy()
    engine = TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD)
    true = engine.generate([[toy.BOS]], SamplingParams(max_new_tokens=4, n=64, seed=0))
    wrong = torch.rand(true.input_ids.shape) < 0.25
    wrong &= true.response_mask
    shifted = torch.where(wrong, true.sampler_logprobs + 3.0, true.sampler_logprobs)
    samples = replace(true, sampler_logprobs=shifted, model_logprobs=shifted)
    scored = Scored(inputs=(), log_base=torch.zeros(64), base_logprobs=torch.zeros(true.input_ids.shape))
    config = BiLevelConfig(policy=PolicyConfig(kind="ppo", icepop_band=(0.5, 5.0)))
    metrics = PolicyUpdate(policy, config).step(samples, torch.randn(64), scored, beta=1.0, counter=0)
    share = float(wrong.sum() / true.response_mask.sum())
    assert metrics["icepop_fraction"] == pytest.approx(share)
    assert metrics["gap_mean"] == pytest.approx(3.0 * share, rel=1e-4)
    assert metrics["gap_max"] == pytest.approx(3.0, rel=1e-4)
    assert metrics["gap_above_1"] == pytest.approx(share)


def test_versions_are_checked_and_selected_with_their_rows() -> None:
    batch = rollouts([[0.0] * 4] * 2, [[0, 1, 1, 1], [0, 0, 2, 2]])
    assert batch.select([1]).versions.tolist() == [[0, 0, 2, 2]]
    with pytest.raises(TypeError, match=r"versions must be torch.int64"):
        replace(batch, versions=torch.zeros(2, 4))
