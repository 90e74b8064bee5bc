"""losses.policy_loss: terms, clipping, aggregation, KL and entropy terms, masking, truncated importance sampling."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.losses import policy_loss
from irlfast.losses.aggregation import AGGREGATIONS
from irlfast.losses.policy import POLICY_KINDS

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]])


def _inputs(seed: int = 0, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = normal(rows, length) - 2
    return {
        "logprobs": base,
        "advantages": normal(rows, length),
        "mask": torch.arange(length) < torch.tensor([length, 3, 1, 0])[:, None],
        "old_logprobs": base + 0.3 * normal(rows, length),
        "ref_logprobs": base + 0.3 * normal(rows, length),
        "rollout_logprobs": base + 0.3 * normal(rows, length),
        "entropy": normal(rows, length).exp(),
    }


ALL_TERMS: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.2, "tis_cap": 1.1}


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", (2 * 1 + 2 * 2 - 3 * 4) / 3),
        ("seq_mean_token_mean", ((2 * 1 + 2 * 2) / 2 - 3 * 4) / 2),
        ("seq_mean_token_sum", (2 * 1 + 2 * 2 - 3 * 4) / 2),
        ("token_sum", 2 * 1 + 2 * 2 - 3 * 4),
    ],
)
def test_reinforce_by_hand(aggregation: str, expected: float) -> None:
    loss, metrics = policy_loss(LOGPROBS, torch.tensor([2.0, -3.0]), MASK, kind="reinforce", aggregation=aggregation)
    assert float(loss) == pytest.approx(expected)
    assert float(metrics["policy"]) == pytest.approx(expected)
    per_token = torch.tensor([[2.0, 2.0, 5.0], [-3.0, 5.0, 5.0]])
    for kind in ("token", "reinforce"):
        assert torch.equal(policy_loss(LOGPROBS, per_token, MASK, kind=kind, aggregation=aggregation).loss, loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # clipped at 1 + hi = 1.3
        (0.5, 2.0, -1.0, -1.0),  # too low with a gain to make: not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped at 1 - lo = 0.8
        (1.5, -2.0, 3.0, 3.0),
        (4.0, -2.0, 6.0, 0.0),  # dual clip at 3 |A|
    ],
)
def test_ppo_term_and_its_gradient_by_hand(ratio: float, advantage: float, expected: float, slope: float) -> None:
    logprobs = torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1),
        kind="ppo",
        old_logprobs=torch.tensor([[-1.0]], dtype=torch.float64),
        clip=(0.2, 0.3),
        dual_clip=3.0,
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(logprobs.grad) == pytest.approx(slope)
    assert float(metrics["clip_fraction"]) == float(slope == 0.0)
    assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == pytest.approx(ratio)
    assert float(metrics["approx_kl"]) == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_first_ppo_step_is_reinforce(aggregation: str) -> None:
    batch = _inputs()
    gradients = []
    for kind in ("ppo", "reinforce"):
        logprobs = batch["logprobs"].clone().requires_grad_()
        loss, metrics = policy_loss(
            logprobs,
            batch["advantages"],
            batch["mask"],
            kind=kind,
            old_logprobs=batch["logprobs"],
            aggregation=aggregation,
        )
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0
        assert float(metrics["approx_kl"]) == 0.0
    assert torch.equal(*gradients)


# cispo's gradient is not that of its value, by definition: its ratio is held constant.
@pytest.mark.parametrize("kind", [kind for kind in POLICY_KINDS if kind != "cispo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradcheck_of_every_term_together(kind: str, aggregation: str, estimator: str) -> None:
    batch = _inputs(1)
    logprobs, entropy = batch.pop("logprobs"), batch.pop("entropy")

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(
            logprobs, **batch, entropy=entropy, kind=kind, kl_estimator=estimator, aggregation=aggregation, **ALL_TERMS
        ).loss

    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("kind", POLICY_KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_garbage_outside_the_mask_changes_nothing_and_gets_no_gradient(kind: str, aggregation: str) -> None:
    batch = _inputs(2)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf):
        dirty = {k: v if k == "mask" else torch.where(batch["mask"], v, garbage) for k, v in batch.items()}
        logprobs, entropy = dirty["logprobs"].requires_grad_(), dirty["entropy"].requires_grad_()
        loss, metrics = policy_loss(**dirty, kind=kind, aggregation=aggregation, **ALL_TERMS)
        gradients = torch.autograd.grad(loss, (logprobs, entropy))
        assert all((g[~batch["mask"]] == 0).all() for g in gradients)
        results.append((loss.detach(), *gradients, *metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", POLICY_KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_batch_without_a_token_has_loss_and_gradient_zero(kind: str, aggregation: str, shape: tuple[int, int]) -> None:
    nan = torch.full(shape, torch.nan)
    logprobs = nan.clone().requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        nan,
        torch.zeros(shape),
        kind=kind,
        old_logprobs=nan,
        ref_logprobs=nan,
        rollout_logprobs=nan,
        entropy=nan,
        aggregation=aggregation,
        **ALL_TERMS,
    )
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(logprobs.grad, torch.zeros(shape))
    assert all(bool(m.isfinite()) for m in metrics.values())


@pytest.mark.parametrize(
    ("aggregation", "whole"),
    [("token_mean", 10), ("seq_mean_token_mean", 3), ("seq_mean_token_sum", 3), ("token_sum", 32)],
)
def test_micro_batches_add_up_to_the_batch(aggregation: str, whole: int) -> None:
    """With the global denominator; without it, the mean of unequal parts' means is another number."""
    batch = _inputs(3)

    def loss(rows: slice, denominator: float | Tensor | None) -> Tensor:
        part = {k: v[rows] for k, v in batch.items()}
        return policy_loss(**part, kind="ppo", aggregation=aggregation, denominator=denominator, **ALL_TERMS).loss

    together = loss(slice(None), whole)
    parts = loss(slice(0, 1), whole) + loss(slice(1, 4), torch.tensor(whole))
    torch.testing.assert_close(parts, together)
    if aggregation != "token_sum":
        torch.testing.assert_close(together, loss(slice(None), None))
        assert abs(float((loss(slice(0, 1), None) + loss(slice(1, 4), None)) / 2 - together)) > 1e-3


def test_padding_changes_nothing() -> None:
    batch = _inputs(4)
    wider = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    a = policy_loss(**batch, kind="ppo", **ALL_TERMS).loss
    torch.testing.assert_close(policy_loss(**wider, kind="ppo", **ALL_TERMS).loss, a, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_term_has_the_gradient_of_the_reverse_kl(estimator: str) -> None:
    """Summed exactly over a vocabulary of 7, each token standing as one response sampled pi(y) of the time."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(0)
    (want,) = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - ref)).sum(), logits)
    got = torch.zeros(7, dtype=torch.float64)
    for token, p in enumerate(logits.softmax(0).detach()):
        loss = policy_loss(
            logits.log_softmax(0)[token].reshape(1, 1),
            torch.zeros(1),
            torch.ones(1, 1),
            kind="reinforce",
            ref_logprobs=ref[token].reshape(1, 1),
            kl_coef=1.0,
            kl_estimator=estimator,
        ).loss
        got += p * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_k1_is_reported_but_refused_as_a_loss_term() -> None:
    zero = torch.zeros(2, 3)
    reported = policy_loss(
        LOGPROBS, torch.zeros(2), MASK, kind="reinforce", ref_logprobs=zero, kl_estimator="k1"
    ).metrics["kl"]
    assert float(reported) == pytest.approx(-7 / 3)
    with pytest.raises(ValueError, match=r"as a loss term k1 has expected gradient 0. Use 'k2' or 'k3'"):
        policy_loss(LOGPROBS, torch.zeros(2), MASK, kind="reinforce", ref_logprobs=zero, kl_estimator="k1", kl_coef=0.1)


def test_entropy_bonus_by_hand() -> None:
    entropy = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]])
    loss, metrics = policy_loss(LOGPROBS, torch.zeros(2), MASK, kind="reinforce", entropy=entropy, entropy_coef=0.5)
    assert float(loss) == pytest.approx(-0.5 * 2.0)
    assert float(metrics["entropy"]) == pytest.approx(2.0)


def test_truncated_importance_sampling_by_hand() -> None:
    """Sampler probabilities off by factors 1/2, 2 and (masked) 100: corrections 2, cut to 1.5, and 1/2."""
    gap = torch.tensor([[math.log(2.0), -math.log(2.0), 5.0], [0.0, 5.0, 5.0]])
    loss, metrics = policy_loss(
        LOGPROBS, torch.ones(2), MASK, kind="reinforce", rollout_logprobs=LOGPROBS - gap, tis_cap=1.5
    )
    assert float(loss) == pytest.approx((1.5 * 1 + 0.5 * 2 + 1.0 * 4) / 3)
    assert float(metrics["rollout_gap"]) == pytest.approx(2 * math.log(2.0) / 3)
    assert float(metrics["rollout_gap_max"]) == pytest.approx(math.log(2.0))
    assert float(metrics["tis_fraction"]) == pytest.approx(1 / 3)
    only_reported = policy_loss(LOGPROBS, torch.ones(2), MASK, kind="reinforce", rollout_logprobs=LOGPROBS - gap)
    assert float(only_reported.loss) == pytest.approx(7 / 3)


def test_ratio_extremes_are_those_of_the_response() -> None:
    """Masked positions have ratio 1; here they would be the smallest, or the largest."""
    for factor in (2.0, 0.5):
        metrics = policy_loss(
            LOGPROBS, torch.ones(2), MASK, kind="ppo", old_logprobs=LOGPROBS - math.log(factor)
        ).metrics
        assert float(metrics["ratio_min"]) == pytest.approx(factor)
        assert float(metrics["ratio_max"]) == pytest.approx(factor)


@pytest.mark.parametrize("gap", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_off_policy_tokens_stay_finite(gap: float, advantage: float) -> None:
    """exp(200) is inf in float32, and inf in the branch that min rejects made the gradient NaN."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    loss = policy_loss(
        logprobs, torch.tensor([advantage]), torch.ones(1, 1), kind="ppo", old_logprobs=logprobs.detach() - gap
    ).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert float(logprobs.grad) == 0.0


def test_gradients_reach_logprobs_and_entropy_alone() -> None:
    batch = {k: v if k == "mask" else v.requires_grad_() for k, v in _inputs(5).items()}
    result = policy_loss(**batch, kind="ppo", **ALL_TERMS)
    result.loss.backward()
    assert {k for k, v in batch.items() if v.grad is not None} == {"logprobs", "entropy"}
    assert all(m.dim() == 0 and not m.requires_grad for m in result.metrics.values())


def test_low_precision_is_computed_in_float32() -> None:
    batch = {k: v if k == "mask" else v.bfloat16() for k, v in _inputs(6).items()}
    wide = {k: v if k == "mask" else v.float() for k, v in batch.items()}
    got = policy_loss(**batch, kind="ppo", **ALL_TERMS).loss
    assert got.dtype == torch.float32
    assert torch.equal(got, policy_loss(**wide, kind="ppo", **ALL_TERMS).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gmpo"}, r"kind is 'gmpo'; this version has \('reinforce', 'token', 'ppo', "),
        ({"kind": "ppo"}, "kind 'ppo' needs old_logprobs, which was not given"),
        ({"kind": "token"}, r"kind 'token' takes advantages \[B, T\]"),
        ({"kl_coef": 0.1}, r"kl_coef = 0\.1 needs ref_logprobs"),
        ({"entropy_coef": 0.1}, r"entropy_coef = 0\.1 needs entropy"),
        ({"tis_cap": 2.0}, r"tis_cap = 2\.0 needs rollout_logprobs"),
        ({"tis_cap": 0.0}, r"tis_cap is 0\.0; expected a positive cap"),
        ({"clip": (1.5, 0.2)}, r"clip is \(1\.5, 0\.2\)"),
        ({"dual_clip": 3.0}, r"dual_clip is 3\.0 with kind 'reinforce'"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"aggregation": "mean"}, "aggregation is 'mean'; expected one of"),
        ({"denominator": 0}, "denominator is 0; expected a positive count"),
        ({"denominator": torch.ones(2)}, r"denominator has shape \(2,\); expected a number or a 0-d tensor"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \(3,\); expected \(2,\), one a response, or \(2, 3\)"),
        ({"mask": torch.ones(2, 1)}, r"mask has shape \(2, 1\); expected that of logprobs, \(2, 3\)"),
        ({"entropy": torch.ones(2)}, r"entropy has shape \(2,\); expected that of logprobs, \(2, 3\)"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    arguments = {"logprobs": LOGPROBS, "advantages": torch.ones(2), "mask": MASK, "kind": "reinforce"} | options
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)
