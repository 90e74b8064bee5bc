"""The Triton importance_weights, through the public op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from segment_cases import narrow
from torch import Tensor
from triton_mutation import assert_noticed

from irlfast.ops import importance_weights
from irlfast.ops.importance import ImportanceWeights, importance_weights_reference

# With blocks of 16: over several, one and one more, a single sample, a group whose samples are all impossible.
SIZES = {-3: 35, 7: 17, 0: 16, 5: 1, 77: 2}


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(request, monkeypatch)


def samples(sizes: dict[int, int], *, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """log p~, log q and group ids in random order; an impossible sample in the largest group, and group 77."""
    groups = torch.cat([torch.full((count,), name) for name, count in sizes.items()])
    log_target = torch.randn(len(groups), dtype=torch.float64) * spread
    log_target[groups == 77] = -math.inf
    log_target[3] = -math.inf
    order = torch.randperm(len(groups))
    return log_target[order], torch.randn(len(groups), dtype=torch.float64), groups[order]


def differentiate(
    device: str, log_target: Tensor, log_proposal: Tensor, upstream: list[Tensor], impl: str, **options: Any
) -> tuple[ImportanceWeights, list[Tensor]]:
    leaves = [x.to(device).requires_grad_() for x in (log_target, log_proposal)]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    result = importance_weights(*leaves, differentiable=True, impl=impl, **options)
    grads = torch.autograd.grad(list(result), leaves, [u.to(x) for u, x in zip(upstream, result, strict=True)])
    return ImportanceWeights(*(x.detach().cpu() for x in result)), [g.cpu() for g in grads]


def check(
    device: str,
    dtype: torch.dtype,
    *,
    grouped: bool = True,
    clip: float | tuple[float, float] | None = None,
    temper: float = 1.0,
    sizes: dict[int, int] = SIZES,
    spread: float = 2.0,
    shift: float = 0.0,
) -> None:
    """Float64 throughout, rounded once; values against the definition, gradients against autograd of the same."""
    log_target, log_proposal, ids = samples(sizes, spread=spread)
    log_target, log_proposal = (log_target + shift).to(dtype), log_proposal.to(dtype)
    groups = ids if grouped else None
    options: dict[str, Any] = {"groups": groups, "clip": clip, "temper": temper}
    count = len(sizes) if grouped else 1
    upstream = [torch.randn(n, dtype=torch.float64) for n in (len(ids), count, count)]
    if grouped and 77 in sizes:
        upstream[1][-1] = 0.0  # log Z of that group is -inf
    upstream = [u.float().double() for u in upstream]
    got, grads = differentiate(device, log_target, log_proposal, upstream, "triton", **options)
    exact, exact_grads = differentiate(
        "cpu", log_target.double(), log_proposal.double(), upstream, "reference", **options
    )
    wide = dtype == torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if wide else {"rtol": 1.5e-7, "atol": 1e-7}
    for mine, truth in zip(got, exact, strict=True):
        assert mine.dtype == (torch.float64 if wide else torch.float32)
        torch.testing.assert_close(mine.double(), truth, **tolerance)
    for mine, truth in zip(grads, exact_grads, strict=True):
        assert mine.dtype == dtype
        relative = 2.0**-8 if dtype == torch.bfloat16 else tolerance["rtol"]
        torch.testing.assert_close(mine.double(), truth, rtol=relative, atol=tolerance["atol"])
    possible = (log_target > -math.inf) & ((ids != 77) if grouped else torch.ones_like(ids, dtype=torch.bool))
    if grouped:
        # The definition, one group after the other, has no rule for impossible ones.
        definition = importance_weights_reference(
            log_target[possible].double(), log_proposal[possible].double(), groups=ids[possible], temper=temper
        )
        if clip is None:
            torch.testing.assert_close(got.weights[possible].double(), definition.weights, **tolerance)


@pytest.mark.parametrize("clip", [None, 0.7, (-0.4, 1.5)])
@pytest.mark.parametrize("temper", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_matches_float64(device: str, grouped: bool, temper: float, clip: float | tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    check(device, torch.float64, grouped=grouped, clip=clip, temper=temper)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types(device: str, dtype: torch.dtype, clip: float | None) -> None:
    torch.manual_seed(1)
    check(device, dtype, clip=clip, temper=0.6)


@pytest.mark.parametrize("clip", [None, 2.0])
def test_ratios_beyond_what_exp_can_hold(device: str, clip: float | None) -> None:
    torch.manual_seed(2)
    check(device, torch.float64, clip=clip, spread=3000.0)
    check(device, torch.float64, clip=clip, shift=-3000.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_float64_in_real_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check("cuda", dtype, clip=1.0, temper=0.7, sizes=dict.fromkeys(range(100), 8) | {200: 513, 300: 4097, 400: 512})


@pytest.mark.parametrize("name", ["weights", "log_normalizer", "ess"])
def test_one_upstream_gradient_alone(device: str, name: str) -> None:
    """The others are then absent, not zeros."""
    torch.manual_seed(3)
    log_target, log_proposal, groups = samples({0: 17, 1: 3})
    gradients = []
    for where, impl in ((device, "triton"), ("cpu", "reference")):
        leaf = log_target.to(where).requires_grad_()
        result = importance_weights(
            leaf, log_proposal.to(where), groups=groups.to(where), clip=0.8, temper=0.7, differentiable=True, impl=impl
        )
        gradients.append(torch.autograd.grad(getattr(result, name).square().sum(), leaf)[0].cpu())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_a_group_does_not_feel_its_neighbours_bit_for_bit(device: str) -> None:
    torch.manual_seed(4)
    log_target, zero = torch.randn(60, device=device) * 30, torch.zeros(60, device=device)
    alone = importance_weights(log_target[:35], zero[:35], impl="triton")
    groups = torch.arange(60, device=device).ge(35).long()
    order = torch.cat([torch.arange(35, 60), torch.arange(35)])
    for rows in (torch.arange(60), order):
        together = importance_weights(log_target[rows], zero, groups=groups[rows], impl="triton")
        first = together.weights[(groups[rows] == 0)]
        assert torch.equal(first, alone.weights)
        assert torch.equal(together.log_normalizer[:1], alone.log_normalizer)
        assert torch.equal(together.ess[:1], alone.ess)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ratio_that_is_none_makes_its_group_nan(device: str, bad: float) -> None:
    """On a GPU, where looking for it would stall; the others stay as they are."""
    torch.manual_seed(5)
    log_target = torch.randn(40, device=device)
    groups = (torch.arange(40, device=device) >= 20).long()
    zero = torch.zeros(40, device=device)
    sound = importance_weights(log_target, zero, groups=groups, clip=1.0, impl="triton")
    log_target[18] = bad
    result = importance_weights(log_target, zero, groups=groups, clip=1.0, impl="triton")
    assert result.weights[:20].isnan().all()
    assert torch.equal(result.weights[20:], sound.weights[20:])
    assert result.log_normalizer.isnan().tolist() == [True, False]
    assert result.ess.isnan().tolist() == [True, False]


def test_strides(device: str) -> None:
    torch.manual_seed(6)
    pair, groups = torch.randn(2, 20, device=device), torch.randint(0, 3, (2, 20), device=device)
    got = importance_weights(pair[0, ::2], pair[1, ::2], groups=groups[0, ::2].to(torch.uint8), impl="triton")
    want = importance_weights(pair[0, ::2].clone(), pair[1, ::2].clone(), groups=groups[0, ::2].clone(), impl="triton")
    assert all(map(torch.equal, got, want))


BREAKS = {
    "the maximum starts at 0": ('lanes = tl.full([BLOCK], float("-inf"), dtype=tl.float64)',
                                "lanes = tl.zeros([BLOCK], dtype=tl.float64)"),
    "a clip bound": ("temper * at_most(at_least(relative, low), high)", "temper * at_least(relative, low)"),
    "the clip's gradient": ("held = (relative < low) | (relative > high)", "held = relative < low"),
    "the average": (" - tl.log((end - begin).to(tl.float64))", ""),
    "the last block": ("inside = place < end", "inside = place < end - end % 16"),
    "log Z in the gradient": ("to_normalizer = -tl.sum(lanes, axis=0)", "to_normalizer = 0 * tl.sum(lanes, axis=0)"),
    "ess in the gradient": ("-2 * tl.load(grad_ess", "2 * tl.load(grad_ess"),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed(name: str) -> None:
    def proof() -> None:
        torch.manual_seed(2)
        # So low that exp of it is 0: from a maximum of 0 nothing would be left.
        check("cpu", torch.float64, clip=1.0, temper=0.7, shift=-3000.0)

    assert_noticed("importance", *BREAKS[name], proof)
