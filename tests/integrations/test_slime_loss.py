"""slime's custom loss and TIS hooks: slime's own numbers, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import slime_worker
import torch
from slime_cases import CASES, LENGTHS, arguments, compare, micro_batch, per_token, reducer, slimes_loss, written_out
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from irlfast.integrations.slime import icepop, loss, tis
from irlfast.integrations.slime.weights import reducer_weights
from irlfast.losses import policy_loss


@pytest.mark.parametrize("name", CASES)
def test_the_loss_its_gradient_and_its_metrics_are_those_of_the_formulas(name: str) -> None:
    args = arguments(**CASES[name])
    batch, logits = micro_batch()
    expected, expected_metrics = written_out(args, batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    value, metrics = loss(args, batch, logits, reducer(args, batch))
    (gradient,) = torch.autograd.grad(value, logits)

    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert set(metrics) == set(expected_metrics)
    for key, metric in metrics.items():
        assert not metric.requires_grad
        torch.testing.assert_close(
            metric.double(), expected_metrics[key].detach().double(), rtol=0, atol=1e-12, msg=key
        )


@pytest.mark.skipif("IRLFAST_SLIME" not in os.environ, reason="set IRLFAST_SLIME to a checkout of slime")
def test_slime_itself_computes_the_same() -> None:
    theirs = slimes_loss(Path(os.environ["IRLFAST_SLIME"]))
    for name in CASES:
        differences = compare(theirs, name)
        assert max(differences.values()) < 5e-6, (name, differences)


def test_k1_is_slimes_number_and_is_warned_about() -> None:
    args = arguments(use_kl_loss=True, kl_loss_coef=0.3, kl_loss_type="k1")
    batch, logits = micro_batch()
    with pytest.warns(UserWarning, match="expected gradient is 0"):
        value, _ = loss(args, batch, logits, reducer(args, batch))
    torch.testing.assert_close(value, written_out(args, batch, logits)[0], rtol=0, atol=1e-12)


def test_the_cases_reach_what_they_are_about() -> None:
    for name, metric in (
        ("defaults", "pg_clipfrac"),
        ("gspo", "pg_clipfrac"),
        ("cispo", "pg_clipfrac"),
        ("tis", "tis_clipfrac"),
        ("opsm", "opsm_clipfrac"),
    ):
        args = arguments(**CASES[name])
        batch, logits = micro_batch()
        assert 0 < float(loss(args, batch, logits, reducer(args, batch))[1][metric]) < 4, name


def test_a_loss_without_its_masks_is_noticed() -> None:
    """The comparisons above can fail: a mask that is left out changes every one of them."""
    batch, logits = micro_batch()
    args = arguments()
    whole = {**batch, "loss_masks": [torch.ones_like(mask) for mask in batch["loss_masks"]]}
    value, _ = loss(args, batch, logits, reducer(args, whole))
    assert abs(float(value.detach()) - float(written_out(args, batch, logits)[0].detach())) > 1e-3


def test_the_first_step_has_no_old_logprobs() -> None:
    """slime leaves them out where the loss can reuse its own: every ratio is then 1."""
    args = arguments()
    batch, logits = micro_batch()
    del batch["log_probs"]
    value, metrics = loss(args, batch, logits, reducer(args, batch))
    torch.testing.assert_close(value, -reducer(args, batch)(torch.cat(batch["advantages"])), rtol=0, atol=1e-12)
    assert metrics["ppo_kl"] == 0
    assert metrics["pg_clipfrac"] == 0


def test_under_a_checkpoint_the_loss_is_computed_twice_and_the_same() -> None:
    """--recompute-loss-function: reading the reducer's weights must not start the recomputation."""
    args = arguments(use_tis=True, entropy_coef=0.1)
    batch, logits = micro_batch()
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return loss(*given)

    value, _ = checkpoint(counted, args, batch, logits, reducer(args, batch), use_reentrant=False)
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(value, logits)
    assert len(calls) == 2
    expected, _ = written_out(args, batch, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-12)


def test_the_gradient_can_take_the_place_of_the_logits() -> None:
    args = arguments(irlfast_inplace_backward=True, entropy_coef=0.1, rollout_temperature=0.5)
    batch, leaf = micro_batch()
    expected, _ = written_out(args, batch, leaf)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    logits = leaf * 1.0
    value, _ = loss(args, batch, logits, reducer(args, batch))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def reject(args: Namespace, *, pg_loss: Tensor, loss_masks: list[Tensor], **kwargs: Any) -> Any:
    """A correction that rejects the first sample and half of the third's last token's weight."""
    masks = [loss_masks[0] * 0, *loss_masks[1:]]
    weights = torch.ones_like(pg_loss)
    weights[10] = 0.5
    return pg_loss * weights, masks, {"kept": weights}


def no_reward_for_length(total_lengths: Any, response_lengths: Any, masks: Any, per_token: bool) -> Any:
    def reduce(values: Tensor) -> Tensor:
        parts = values.split(response_lengths)
        return sum((part * mask).sum() / 10 for part, mask in zip(parts, masks, strict=True))

    return reduce


def test_custom_corrections_and_reducers_are_called_as_slime_calls_them() -> None:
    with patch.dict(sys.modules, {"slime_hooks": types.ModuleType("slime_hooks")}):
        sys.modules["slime_hooks"].reject = reject
        sys.modules["slime_hooks"].reducer = no_reward_for_length
        changed = {
            "use_tis": True,
            "custom_tis_function_path": "slime_hooks.reject",
            "custom_pg_loss_reducer_function_path": "slime_hooks.reducer",
        }
        args = arguments(entropy_coef=0.1, **changed)
        batch, logits = micro_batch()
        value, metrics = loss(args, batch, logits, reducer(args, batch))
    plain = arguments(entropy_coef=0.1)
    masks = [batch["loss_masks"][0] * 0, *batch["loss_masks"][1:]]
    whole, _ = written_out(plain, batch, logits)
    # By hand: the entropy keeps the rollout's own counts and loses what was rejected; the policy term has its own.
    new, entropies = per_token(logits[0], batch, 1.0)
    ratio, advantages = torch.exp(torch.cat(new) - torch.cat(batch["log_probs"])), torch.cat(batch["advantages"])
    terms = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    terms[10] *= 0.5
    policy = no_reward_for_length(None, batch["response_lengths"], masks, False)(terms)
    entropy = reducer(plain, batch, masks)(torch.cat(entropies))
    torch.testing.assert_close(value, policy - 0.1 * entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        metrics["kept"], reducer(plain, batch)(torch.tensor([1.0] * 10 + [0.5] + [1.0] * 3)).double(), rtol=0, atol=1e-6
    )
    assert abs(float((value - whole).detach())) > 1e-3


@pytest.mark.parametrize("hook", [tis, icepop])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections_are_those_of_policy_loss(hook: Any, level: Any) -> None:
    batch, _ = micro_batch()
    args = arguments(tis_clip=1.2, tis_clip_low=0.7 if hook is icepop else 0.0, irlfast_tis_level=level)
    lengths = batch["response_lengths"]
    old, mask = torch.cat(batch["log_probs"]), torch.cat(batch["loss_masks"])
    advantages, offsets = torch.cat(batch["advantages"]), torch.tensor([0, *lengths]).cumsum(0)
    given = {"train_log_probs": batch["log_probs"], "rollout_log_probs": batch["rollout_log_probs"]}
    terms, masks, metrics = hook(
        args,
        pg_loss=-advantages,
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=lengths,
        **given,
    )
    correction: Any = {"tis_cap": 1.2} if hook is tis else {"icepop_band": (0.7, 1.2)}
    expected = policy_loss(
        old,
        advantages,
        mask,
        kind="ppo",
        old_logprobs=old,
        rollout_logprobs=torch.cat(batch["rollout_log_probs"]),
        cu_seqlens=offsets,
        tis_level=level,
        aggregation="token_sum",
        **correction,
    )
    torch.testing.assert_close((terms * mask).sum(), expected.loss, rtol=0, atol=1e-12)
    assert masks is batch["loss_masks"]
    fraction = expected.metrics["tis_fraction" if hook is tis else "icepop_fraction"]
    assert 0 < float(fraction) < 1
    torch.testing.assert_close((metrics["tis_clipfrac"] * mask).sum() / mask.sum(), fraction, rtol=0, atol=1e-12)


def fake_megatron(rank: int, size: int) -> dict[str, types.ModuleType]:
    mpu = types.ModuleType("megatron.core.mpu")
    mpu.get_context_parallel_rank = lambda: rank
    core = types.ModuleType("megatron.core")
    core.mpu = mpu
    return {"megatron": types.ModuleType("megatron"), "megatron.core": core}


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_add_up_to_the_whole(size: int) -> None:
    """Samples of 7, 2, 11 and 5 tokens in 4 or 6 chunks: some of one token, some of padding alone."""
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": "k2"}
    args = arguments(context_parallel_size=size, entropy_coef=0.05, use_tis=True, **kl)
    batch, logits = micro_batch()
    expected, metrics = written_out(args, batch, logits)
    (gradient,) = torch.autograd.grad(expected, logits)
    assert_ranks_add_up(args, batch, logits, expected, gradient, metrics)


def test_context_parallel_ranks_reject_the_tokens_that_they_have() -> None:
    hooks = types.ModuleType("slime_hooks")
    hooks.reject = lambda **given: (given["pg_loss"], [*given["loss_masks"][:2], *alternating(given)], {})
    args = arguments(entropy_coef=0.05, use_tis=True, custom_tis_function_path="slime_hooks.reject")
    batch, logits = micro_batch()
    with patch.dict(sys.modules, {"slime_hooks": hooks}):
        expected, metrics = loss(args, batch, logits, reducer(args, batch))
        (gradient,) = torch.autograd.grad(expected, logits)
        args.context_parallel_size = 2
        assert_ranks_add_up(args, batch, logits, expected, gradient, metrics)
    assert abs(float((expected - written_out(arguments(entropy_coef=0.05), batch, logits)[0]).detach())) > 1e-3


def alternating(given: dict[str, Any]) -> list[Tensor]:
    """The last two samples' masks without every second token."""
    return [mask * (torch.arange(len(mask)) % 2 == 0) for mask in given["loss_masks"][2:]]


def assert_ranks_add_up(
    args: Namespace,
    batch: dict[str, Any],
    logits: Tensor,
    expected: Tensor,
    expected_gradient: Tensor,
    expected_metrics: dict[str, Tensor],
) -> None:
    size = args.context_parallel_size
    total, sums, gradient = torch.zeros(()), dict.fromkeys(expected_metrics, 0.0), torch.zeros_like(logits)
    for rank in range(size):
        rows, tokens = zigzag(batch, rank, size)
        local = torch.cat([logits.detach()[0], torch.zeros(1, logits.shape[2])])[rows][None].requires_grad_()
        mine = dict(batch)
        for name in ("advantages", "log_probs", "rollout_log_probs", "ref_log_probs"):
            mine[name] = [values[kept] for values, kept in zip(batch[name], tokens, strict=True)]
        masks = [mask[kept] for mask, kept in zip(batch["loss_masks"], tokens, strict=True)]
        reduce = reducer(args, {**batch, "response_lengths": [len(mask) for mask in masks]}, masks)
        with patch.dict(sys.modules, fake_megatron(rank, size)):
            value, metrics = loss(args, mine, local, reduce)
        value.backward()
        total = total + value.detach()
        for name, number in metrics.items():
            sums[name] += float(number)
        for row, place in enumerate(rows.tolist()):
            if place < logits.shape[1]:
                gradient[0, place] += local.grad[0, row]
    torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    for name, number in expected_metrics.items():
        assert sums[name] == pytest.approx(float(number.detach()), abs=1e-12), name


def zigzag(batch: dict[str, Any], rank: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """Which rows of the whole logits a rank has (their number + 1 for padding), and of each response which tokens."""
    rows, tokens, start, none = [], [], 0, sum(batch["total_lengths"]) + 5
    for whole, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        chunk = -(-whole // (2 * size))
        positions = [
            *range(rank * chunk, (rank + 1) * chunk),
            *range((2 * size - rank - 1) * chunk, (2 * size - rank) * chunk),
        ]
        rows += [start + p if p < whole else none for p in positions]
        predicted = [p + 1 - (whole - response) for p in positions]
        tokens.append(torch.tensor([t for t in predicted if 0 <= t < response], dtype=torch.int64))
        start += whole
    return torch.tensor(rows), tokens


def test_tensor_parallel_ranks_have_the_wholes_loss_and_their_columns_gradient(tmp_path: Path) -> None:
    """This process is one of the two: what each finds, it compares itself."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    other = subprocess.Popen(
        [sys.executable, slime_worker.__file__, "1", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with patch.dict(sys.modules):
            slime_worker.main(0, str(tmp_path))
        output = other.communicate(timeout=120)[0]
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    assert other.returncode == 0, output


def test_a_rank_without_response_tokens_still_has_a_gradient() -> None:
    args = arguments(context_parallel_size=8)
    batch, logits = micro_batch()
    one = {name: values[1:2] for name, values in batch.items()}
    for name in ("advantages", "log_probs", "rollout_log_probs", "ref_log_probs"):
        one[name] = [one[name][0][:0]]
    local = logits.detach()[:, :2].clone().requires_grad_()
    with patch.dict(sys.modules, fake_megatron(5, 8)):
        value, metrics = loss(args, one, local, lambda values: values.sum())
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(local.grad, torch.zeros_like(local))
    assert all(float(number) == 0 for number in metrics.values())


def test_the_weights_of_a_reducer() -> None:
    args = arguments()
    batch, _ = micro_batch()
    weights = reducer_weights(reducer(args, batch), torch.zeros(sum(r for _, r in LENGTHS)))
    third = [1 / 7, 0, 0, 1 / 7, 1 / 7, 1 / 7]
    torch.testing.assert_close(weights, torch.tensor([0.25] * 4 + [1.0] + third + [1 / 7] * 3))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rollout_top_p": 0.9}, NotImplementedError, "rollout_top_p is 0.9"),
        ({"context_parallel_size": 2, "allgather_cp": True}, NotImplementedError, "allgather-cp"),
        (
            {"context_parallel_size": 2, "advantage_estimator": "gspo"},
            NotImplementedError,
            "gspo needs whole responses",
        ),
        ({"context_parallel_size": 2, "use_opsm": True}, NotImplementedError, "use-opsm needs whole responses"),
        ({"use_tis": True, "irlfast_tis_level": "word"}, ValueError, "expected 'token' or 'sequence'"),
    ],
)
def test_what_is_not_there_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    args = arguments(**changed)
    batch, logits = micro_batch()
    with patch.dict(sys.modules, fake_megatron(0, 2)), pytest.raises(error, match=message):
        loss(args, batch, logits, reducer(args, batch))


def test_bad_batches_are_named() -> None:
    args = arguments()
    batch, logits = micro_batch()
    reduce = reducer(args, batch)
    with pytest.raises(ValueError, match=r"logits has shape \(30, 12\); expected \[1, T, V\]"):
        loss(args, batch, logits[0], reduce)
    with pytest.raises(ValueError, match="logits has 9 rows; total_lengths says that the samples take 25"):
        loss(args, batch, logits[:, :9], reduce)
    with pytest.raises(ValueError, match="sample 1 has 2 tokens, 2 of them response"):
        loss(args, {**batch, "response_lengths": [4, 2, 6, 3]}, logits, reduce)
    with pytest.raises(ValueError, match="the batch has no ref_log_probs, which --use-kl-loss needs"):
        loss(arguments(use_kl_loss=True, kl_loss_type="k2"), {**batch, "ref_log_probs": []}, logits, reduce)
    with pytest.raises(ValueError, match="13 advantages for 14 response tokens"):
        loss(
            args,
            {**batch, "advantages": [a[:-1] if i == 0 else a for i, a in enumerate(batch["advantages"])]},
            logits,
            reduce,
        )
    spread = {**batch, "train_log_probs": [x[:-1] for x in batch["log_probs"]]}
    with pytest.raises(ValueError, match="this rank has 3 of sample 0's 4 response tokens"):
        tis(
            arguments(irlfast_tis_level="sequence"),
            pg_loss=torch.zeros(10),
            train_log_probs=spread["train_log_probs"],
            rollout_log_probs=[x[:-1] for x in batch["rollout_log_probs"]],
            loss_masks=batch["loss_masks"],
        )
