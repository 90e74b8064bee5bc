"""ops.importance_weights: values, ragged groups, extremes, clipping and tempering, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.ops import importance_weights
from irlfast.ops.importance import importance_weights_reference

log_densities = st.lists(st.floats(-300, 300), min_size=1, max_size=24)


def test_values_by_hand() -> None:
    # Ratios p~/q: group 7 has 1 and 3; group -2 has 2 alone.
    log_target = torch.tensor([0.0, math.log(4.0), math.log(3.0)], dtype=torch.float64)
    log_proposal = torch.tensor([0.0, math.log(2.0), 0.0], dtype=torch.float64)
    weights, log_normalizer, ess = importance_weights(log_target, log_proposal, groups=torch.tensor([7, -2, 7]))
    assert weights.tolist() == pytest.approx([0.25, 1.0, 0.75])
    assert log_normalizer.tolist() == pytest.approx([math.log(2.0), math.log(2.0)])  # ids ascend: -2, then 7
    assert ess.tolist() == pytest.approx([1.0, 1 / (1 / 16 + 9 / 16)])


@settings(deadline=None)
@given(
    ratios=log_densities,
    seed=st.integers(0, 2**16),
    clip=st.sampled_from([None, 0.5, 3.0, (-1.0, 2.0)]),
    temper=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_against_reference_on_ragged_groups(
    ratios: list[float], seed: int, clip: float | tuple[float, float] | None, temper: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_target = torch.tensor(ratios, dtype=torch.float64)
    log_proposal = torch.randn(len(ratios), generator=generator, dtype=torch.float64)
    groups = torch.randint(-3, 4, (len(ratios),), generator=generator)
    got = importance_weights(log_target, log_proposal, groups=groups, clip=clip, temper=temper)
    want = importance_weights_reference(log_target, log_proposal, groups=groups, clip=clip, temper=temper)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(ratios=log_densities, shift=st.floats(-1000, 1000), seed=st.integers(0, 2**16))
def test_shift_moves_the_normaliser_alone_clipped_or_not(ratios: list[float], shift: float, seed: int) -> None:
    """The target is unnormalised: adding a constant to it may change no weight. A clip of l itself would."""
    log_target = torch.tensor(ratios, dtype=torch.float64)
    zero = torch.zeros_like(log_target)
    for clip in (None, 2.0):
        plain = importance_weights(log_target, zero, clip=clip)
        moved = importance_weights(log_target + shift, zero, clip=clip)
        torch.testing.assert_close(moved.weights, plain.weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved.ess, plain.ess, rtol=1e-9, atol=0)
        torch.testing.assert_close(moved.log_normalizer, plain.log_normalizer + shift, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(ratios=log_densities, seed=st.integers(0, 2**16))
def test_permutation_and_relabelling_change_nothing(ratios: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_target = torch.tensor(ratios)
    log_proposal = torch.randn(len(ratios), generator=generator)
    groups = torch.randint(0, 5, (len(ratios),), generator=generator)
    weights, log_normalizer, ess = importance_weights(log_target, log_proposal, groups=groups)
    order = torch.randperm(len(ratios), generator=generator)
    shuffled = importance_weights(log_target[order], log_proposal[order], groups=groups[order])
    torch.testing.assert_close(shuffled.weights, weights[order], rtol=1e-6, atol=1e-9)
    relabelled = importance_weights(log_target, log_proposal, groups=-10 * groups)
    assert torch.equal(relabelled.weights, weights)
    assert torch.equal(relabelled.log_normalizer, log_normalizer.flip(0))
    assert torch.equal(relabelled.ess, ess.flip(0))
    for group in groups.unique():
        assert float(weights[groups == group].sum()) == pytest.approx(1, rel=1e-5)
    counts = groups.unique(return_counts=True)[1]
    assert ((ess >= 1 - 1e-5) & (ess <= counts * (1 + 1e-5))).all()


def test_a_group_does_not_feel_its_neighbours_bit_for_bit() -> None:
    torch.manual_seed(0)
    log_target = torch.randn(1000) * 30
    alone = importance_weights(log_target[:257], torch.zeros(257))
    groups = torch.arange(1000).ge(257).long()
    together = importance_weights(log_target, torch.zeros(1000), groups=groups)
    assert torch.equal(together.weights[:257], alone.weights)
    assert torch.equal(together.log_normalizer[:1], alone.log_normalizer)


def test_estimates_the_normaliser_and_expectations_of_the_target() -> None:
    torch.manual_seed(0)
    target = torch.randn(50, dtype=torch.float64)
    drawn = torch.randint(0, 50, (200_000,))
    weights, log_normalizer, _ = importance_weights(target[drawn], torch.full((200_000,), -math.log(50.0)))
    assert float(log_normalizer) == pytest.approx(float(target.logsumexp(0)), abs=0.02)
    assert float(weights @ target[drawn]) == pytest.approx(float(target.softmax(0) @ target), abs=0.02)


def test_extreme_ratios_neither_overflow_nor_vanish() -> None:
    log_target = torch.tensor([-5000.0, -5001.0, 4000.0, 3999.0])
    weights, log_normalizer, ess = importance_weights(log_target, torch.zeros(4), groups=torch.tensor([0, 0, 1, 1]))
    share = 1 / (1 + math.exp(-1.0))
    assert weights.tolist() == pytest.approx([share, 1 - share] * 2, rel=1e-6)
    assert log_normalizer.tolist() == pytest.approx([-5000 - math.log(2 * share), 4000 - math.log(2 * share)])
    assert ess.tolist() == pytest.approx([1 / (share**2 + (1 - share) ** 2)] * 2)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("temper", [0.0, 1.0])
def test_impossible_samples_have_no_weight(clip: float | None, temper: float) -> None:
    log_target = torch.tensor([-torch.inf, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    result = importance_weights(
        log_target,
        torch.zeros(3),
        groups=torch.tensor([0, 0, 1]),
        clip=clip,
        temper=temper,
        differentiable=True,
    )
    assert result.weights.tolist() == [0.0, 1.0, 0.0]
    assert result.log_normalizer.tolist() == [-math.log(2.0), -torch.inf]
    assert result.ess.tolist() == [1.0, 0.0]
    (result.weights.sum() + result.ess.sum() + result.log_normalizer[0]).backward()
    assert log_target.grad.isfinite().all()


def test_clip_bounds_a_weight_relative_to_the_average() -> None:
    log_target = torch.tensor([math.log(100.0), 0.0, 0.0, 0.0], dtype=torch.float64)
    weights = importance_weights(log_target, torch.zeros(4), clip=(-torch.inf, math.log(2.0))).weights
    average = 103 / 4  # ratios over their average: 100/25.75 = 3.88, cut to 2; 1/25.75 left as it is
    assert float(weights[0] / weights[1]) == pytest.approx(2 * average)
    log_ratio = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    bounded = importance_weights(log_ratio, torch.zeros(100), clip=1.0).weights
    assert float(bounded.max() / bounded.min()) == pytest.approx(math.exp(2.0))


def test_temper_zero_is_uniform() -> None:
    result = importance_weights(torch.randn(8) * 50, torch.zeros(8), temper=0.0)
    assert result.weights.tolist() == pytest.approx([1 / 8] * 8)
    assert float(result.ess) == pytest.approx(8)


def test_detached_unless_asked() -> None:
    log_target = torch.randn(5, requires_grad=True)
    assert not any(t.requires_grad for t in importance_weights(log_target, torch.zeros(5)))
    assert all(t.requires_grad for t in importance_weights(log_target, torch.zeros(5), differentiable=True))


@pytest.mark.parametrize("clip", [None, 1.5])
def test_gradcheck(clip: float | None) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    groups = torch.tensor([3, 1, 3, 3, 1, 9, 1])
    assert torch.autograd.gradcheck(
        lambda a, b: importance_weights(a, b, groups=groups, clip=clip, temper=0.7, differentiable=True), inputs
    )


def test_errors() -> None:
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match=r"log_target\[1\] - log_proposal\[1\] = 0\.0 - -inf"):
        importance_weights(zero, torch.tensor([0.0, -torch.inf, 0.0]))
    with pytest.raises(ValueError, match=r"log_target\[2\] - log_proposal\[2\] = nan"):
        importance_weights(torch.tensor([0.0, 0.0, torch.nan]), zero)
    with pytest.raises(ValueError, match=r"groups has shape \(2,\); expected one id a row, \(3,\)"):
        importance_weights(zero, zero, groups=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"groups has dtype torch.float32; expected integer group ids"):
        importance_weights(zero, zero, groups=zero)
    with pytest.raises(ValueError, match="log_target is empty"):
        importance_weights(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"log_target has shape \(3,\) and log_proposal \(2,\)"):
        importance_weights(zero, torch.zeros(2))
    with pytest.raises(ValueError, match="clip is -1"):
        importance_weights(zero, zero, clip=-1.0)
    with pytest.raises(ValueError, match="clip is nan"):
        importance_weights(zero, zero, clip=math.nan)
    with pytest.raises(ValueError, match=r"temper is -0\.5; expected a finite exponent of at least 0"):
        importance_weights(zero, zero, temper=-0.5)


@pytest.mark.parametrize("clip", [None, 0.7, (-0.4, 1.5)])
@pytest.mark.parametrize("temper", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_and_vectorised_reference_agree_in_value_and_gradient(
    dtype: torch.dtype, temper: float, clip: float | tuple[float, float] | None
) -> None:
    """Every output has its own upstream gradient, an impossible sample and a group of nothing else among them."""
    torch.manual_seed(0)
    groups = torch.randint(-3, 5, (200,))
    groups[:2] = 77  # both impossible
    base = torch.randn(200, dtype=dtype) * 2
    base[[0, 1, 30]] = -torch.inf
    proposal = torch.randn(200, dtype=dtype)
    upstream = None
    results = []
    for impl in ("cpu", "reference"):
        leaves = [base.clone().requires_grad_(), proposal.clone().requires_grad_()]
        outputs = importance_weights(*leaves, groups=groups, clip=clip, temper=temper, differentiable=True, impl=impl)
        upstream = upstream or [torch.randn_like(x) for x in outputs]
        upstream[1][-1] = 0.0  # log Z of the impossible group is -inf
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


def test_one_upstream_gradient_alone() -> None:
    """The others are then absent, not zeros: each was once taken to be there."""
    torch.manual_seed(0)
    groups = torch.tensor([0, 1, 0, 1, 1])
    log_target = torch.randn(5, dtype=torch.float64)
    for name in ("weights", "log_normalizer", "ess"):
        gradients = []
        for impl in ("cpu", "reference"):
            leaf = log_target.clone().requires_grad_()
            result = importance_weights(
                leaf, torch.zeros(5), groups=groups, clip=0.8, temper=0.7, differentiable=True, impl=impl
            )
            gradients.append(torch.autograd.grad(getattr(result, name).square().sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_groups", [False, True])
def test_opcheck(with_groups: bool, grad: bool) -> None:
    log_target, log_proposal = torch.randn(6).requires_grad_(grad), torch.randn(6)
    groups = torch.tensor([4, 1, 4, 4, 1, 0]) if with_groups else None
    torch.library.opcheck(
        torch.ops.irlfast.importance_weights.default, (log_target, log_proposal, groups, -1.0, 2.0, 0.5)
    )


@pytest.mark.parametrize("differentiable", [False, True])
def test_compiles_without_a_break(differentiable: bool) -> None:
    log_target, log_proposal = torch.randn(6), torch.randn(6)
    compiled = torch.compile(importance_weights, fullgraph=True, backend="aot_eager")
    arguments = {"clip": 1.0, "differentiable": differentiable}
    for mine, plain in zip(
        compiled(log_target, log_proposal, **arguments),
        importance_weights(log_target, log_proposal, **arguments),
        strict=True,
    ):
        assert torch.equal(mine, plain)


def test_compiles_with_groups_where_sizes_may_depend_on_data() -> None:
    """How many groups there are, only the data can tell: the setting is the one torch has for that."""
    log_target, log_proposal, groups = torch.randn(6), torch.randn(6), torch.tensor([4, 1, 4, 4, 1, 0])
    compiled = torch.compile(importance_weights, fullgraph=True, backend="aot_eager")
    want = importance_weights(log_target, log_proposal, groups=groups)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = compiled(log_target, log_proposal, groups=groups)
    assert all(map(torch.equal, got, want))


def test_a_second_derivative_is_refused() -> None:
    leaf = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ess = importance_weights(leaf, torch.zeros(4), differentiable=True).ess
    (gradient,) = torch.autograd.grad(ess, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="importance_weights has no second derivative; where"):
        gradient.sum().backward()


def test_scattered_memory_and_narrow_types() -> None:
    torch.manual_seed(0)
    log_target, log_proposal = torch.randn(2, 10), torch.randn(2, 10)
    groups = torch.randint(0, 3, (2, 5))
    want = importance_weights(log_target[0, ::2].clone(), log_proposal[1, ::2].clone(), groups=groups[0])
    got = importance_weights(log_target[0, ::2], log_proposal[1, ::2], groups=groups[0].to(torch.uint8))
    assert all(map(torch.equal, got, want))
    half = importance_weights(log_target[0].bfloat16(), log_proposal[0].half())
    assert {x.dtype for x in half} == {torch.float32}
    assert {x.dtype for x in importance_weights(log_target[0].double(), log_proposal[0])} == {torch.float64}
