"""ops.gae: the definition by hand and as a double sum, kernel against reference, padded against packed, masks."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.ops import gae


def test_values_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 3.0]])
    # deltas with gamma 1/2: 1 + 1/2 - 1/2 = 1; 0 + 3/2 - 1 = 1/2; 2 - 3 = -1; gamma lam = 1/4
    advantages, returns = gae(rewards, values, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1 + (0.5 - 0.25) / 4, 0.5 - 0.25, -1.0]]
    assert returns.tolist() == [[1.5625, 1.25, 2.0]]
    assert gae(rewards, values, gamma=0.5, lam=0.5, last_values=torch.tensor([4.0])).advantages[0, 2] == 1.0
    # A masked token is passed over: as if it were not there.
    masked = gae(rewards, torch.tensor([[0.5, torch.nan, 3.0]]), torch.tensor([[1, 0, 1]]), gamma=0.5, lam=0.5)
    assert masked.advantages.tolist() == [[1 + 1.5 - 0.5 - 0.25, 0.0, -1.0]]
    assert masked.returns.tolist() == [[2.25, 0.0, 2.0]]


def _definition(rewards: list[float], values: list[float], last: float, gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, as a double loop."""
    after = [*values[1:], last][: len(values)]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


# 256 and 257: a whole block of the kernel's mask, and one token more.
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 9), st.sampled_from([256, 257])), min_size=1, max_size=5),
    padding=st.integers(0, 5),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_kernel_reference_and_definition_agree(
    lengths: list[int], padding: int, gamma: float, lam: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rewards, values = (torch.randn(total, generator=generator, dtype=torch.float64) for _ in range(2))
    last = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) > 0.2
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "last_values": last}
    want = torch.zeros(total, dtype=torch.float64)
    for i in range(len(lengths)):
        kept = torch.arange(total)[offsets[i] : offsets[i + 1]]
        kept = kept[mask[kept]]
        advantages = _definition(rewards[kept].tolist(), values[kept].tolist(), float(last[i]), gamma, lam)
        want[kept] = torch.tensor(advantages, dtype=torch.float64)
    for impl in ("cpu", "reference"):
        got = gae(rewards, values, mask, cu_seqlens=offsets, impl=impl, **options)
        torch.testing.assert_close(got.advantages, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.returns, torch.where(mask, want + values, 0.0), rtol=1e-12, atol=1e-12)
        inside = torch.arange(max(lengths) + padding) < torch.tensor(lengths)[:, None]

        def padded(x: Tensor, fill: float, inside: Tensor = inside) -> Tensor:
            return torch.full(inside.shape, fill, dtype=x.dtype).masked_scatter(inside, x)

        wide = gae(padded(rewards, torch.nan), padded(values, torch.nan), padded(mask, 0), impl=impl, **options)
        assert torch.equal(wide.advantages[inside], got.advantages)
        assert (wide.advantages[~inside] == 0).all()


def test_lam_one_is_the_discounted_return_and_detached() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    result = gae(rewards, values, gamma=0.9, lam=1.0)
    want = torch.stack([(rewards[:, t:] * 0.9 ** torch.arange(5 - t)).sum(1) for t in range(5)], dim=1)
    torch.testing.assert_close(result.returns, want.detach())
    assert not any(x.requires_grad for x in result)


def test_low_precision_thread_count_and_layout() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(300, 200).bfloat16(), torch.randn(300, 200).bfloat16()
    mask = torch.rand(300, 200) > 0.3
    want = gae(rewards.float(), values.float(), mask)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, gae(rewards, values, mask.double()), want))
    finally:
        torch.set_num_threads(threads)
    assert want.advantages.dtype == torch.float32
    assert all(map(torch.equal, gae(rewards.t().contiguous().t(), values, mask), want))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    for impl in ("cpu", "reference"):
        assert gae(torch.zeros(shape), torch.zeros(shape), impl=impl).advantages.shape == shape


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 2, 2, 6]), torch.tensor([0, 2, 2, 6], dtype=torch.int32)])
def test_opcheck(offsets: Tensor | None) -> None:
    shape, count = ((6,), 3) if offsets is not None else ((2, 3), 2)
    arguments = (torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3, offsets, torch.randn(count), 0.9, 0.8)
    torch.library.opcheck(torch.ops.irlfast.gae.default, arguments)


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    rewards, values, offsets = torch.randn(6), torch.randn(6), torch.tensor([0, 2, 2, 6])

    def advantages(rewards: Tensor, values: Tensor, offsets: Tensor | None) -> Tensor:
        return gae(rewards, values, cu_seqlens=offsets).advantages * 2

    compiled = torch.compile(advantages, backend="aot_eager", fullgraph=True)
    for r, v, o in ((rewards, values, offsets), (rewards.view(2, 3), values.view(2, 3), None)):
        leaf = v.detach().requires_grad_()  # as a critic gives it; nothing flows back
        result = compiled(r, leaf, o)
        assert not result.requires_grad
        assert torch.equal(result, advantages(r, leaf, o))


def test_errors() -> None:
    zero = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"values has shape \(3,\); expected \(2, 3\)"):
        gae(zero, zero[0])
    with pytest.raises(ValueError, match=r"last_values has shape \(3,\); expected \(2,\)"):
        gae(zero, zero, last_values=torch.zeros(3))
    with pytest.raises(ValueError, match=r"gamma is 1\.5; expected a number in \[0, 1\]"):
        gae(zero, zero, gamma=1.5)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\); expected padded \[B, T\]"):
        gae(zero[0], zero[0])
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 2; expected from 0 to 3"):
        gae(zero[0], zero[0], cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(TypeError, match=r"rewards has dtype torch.int64"):
        gae(zero.long(), zero)
