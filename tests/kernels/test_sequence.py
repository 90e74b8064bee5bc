"""The Triton sequence_logprobs, through the public op."""

from __future__ import annotations

import pytest
import torch
from segment_cases import LONG, RAGGED, narrow, offsets, pack, sequences, unlooked_at
from torch import Tensor
from triton_mutation import assert_noticed

from irlfast.ops import sequence_logprobs
from irlfast.ops.sequence import sequence_logprobs_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(request, monkeypatch)


def check(device: str, dtype: torch.dtype, layout: str, reduction: str, lengths: list[int]) -> None:
    """Sums in float64, rounded once; the gradient is the upstream, or its share, rounded to the log-probs' dtype."""
    mask, draw = sequences(lengths)
    logprobs = draw(3.0, -4.0).to(dtype)
    cu_seqlens = None
    if layout != "padded":
        logprobs, mask = pack(logprobs, lengths), pack(mask, lengths)
        cu_seqlens = offsets(lengths, torch.int32 if "32" in layout else torch.int64)
    leaf = logprobs.to(device).requires_grad_()
    where = None if cu_seqlens is None else cu_seqlens.to(device)
    got = sequence_logprobs(leaf, mask.to(device), cu_seqlens=where, reduction=reduction, impl="triton")
    exact_leaf = logprobs.double().requires_grad_()
    want = sequence_logprobs_reference(exact_leaf, mask, cu_seqlens=cu_seqlens, reduction=reduction)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    single = {"rtol": 1e-14, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1.2e-7, "atol": 1e-9}
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), **single)
    upstream = torch.randn(len(lengths), dtype=got.dtype)
    (gradient,) = torch.autograd.grad(got, leaf, upstream.to(device))
    (exact,) = torch.autograd.grad(want, exact_leaf, upstream.double())
    assert gradient.dtype == dtype
    # The interpreter cuts bfloat16 off, where a GPU rounds.
    relative = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}.get(dtype, single["rtol"])
    torch.testing.assert_close(gradient.cpu().double(), exact, rtol=relative, atol=1e-14)
    assert (gradient.cpu()[~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed int32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device: str, dtype: torch.dtype, layout: str, reduction: str) -> None:
    torch.manual_seed(0)
    check(device, dtype, layout, reduction, RAGGED)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_in_real_sizes(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    check("cuda", dtype, layout, "mean", LONG)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64], ids=str)
def test_a_mask_may_have_any_dtype(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logprobs, mask = torch.randn(2, 20, device=device), torch.rand(2, 20, device=device) > 0.5
    words = torch.where(mask, 0.25, -0.0).to(dtype) if dtype.is_floating_point else mask.to(dtype) * 64
    plain = sequence_logprobs(logprobs, mask, reduction="mean", impl="triton")
    assert torch.equal(sequence_logprobs(logprobs, words, reduction="mean", impl="triton"), plain)


def test_padding_neighbours_and_strides_do_not_show(device: str) -> None:
    torch.manual_seed(2)
    logprobs, mask = torch.randn(5, 37, device=device), torch.rand(5, 37, device=device) > 0.3
    want = sequence_logprobs(logprobs, mask, impl="triton")

    def run(values: Tensor, mask: Tensor | None, **options: Tensor) -> Tensor:
        return sequence_logprobs(values, mask, impl="triton", **options)

    assert torch.equal(run(logprobs[2:3], mask[2:3]), want[2:3])
    assert torch.equal(run(logprobs.t().contiguous().t(), mask.t().contiguous().t()), want)
    pad = torch.nn.functional.pad
    assert torch.equal(run(pad(logprobs, (0, 40), value=torch.nan), pad(mask, (0, 40))), want)
    flat = run(logprobs.reshape(-1), mask.reshape(-1), cu_seqlens=torch.arange(0, 186, 37, device=device))
    assert torch.equal(flat, want)
    row = logprobs[:1].expand(5, 37)
    assert torch.equal(run(row, None), run(row.contiguous(), None))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing(device: str, shape: tuple[int, int]) -> None:
    logprobs = torch.zeros(shape, device=device, requires_grad=True)
    total = sequence_logprobs(logprobs, impl="triton", reduction="mean")
    assert total.tolist() == [0.0] * shape[0]
    (gradient,) = torch.autograd.grad(total.sum(), logprobs)
    assert gradient.shape == shape


def test_the_second_derivative_is_that_of_a_linear_function(device: str) -> None:
    logprobs = torch.randn(2, 20, device=device, dtype=torch.float64, requires_grad=True)
    total = sequence_logprobs(logprobs, reduction="mean", impl="triton").square().sum()
    (gradient,) = torch.autograd.grad(total, logprobs, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0].sum(), logprobs)
    torch.testing.assert_close(second[0], torch.full_like(second[0], 2 / 20))


def test_offsets_that_leave_a_gap_are_held_within_the_tensor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are not looked at, which would stall."""
    unlooked_at(monkeypatch)
    logprobs = torch.ones(40, device=device, requires_grad=True)
    cu_seqlens = torch.tensor([20, 25, 24, 99], device=device)
    total = sequence_logprobs(logprobs, cu_seqlens=cu_seqlens, impl="triton")
    assert total.tolist() == [5.0, 0.0, 16.0]
    (gradient,) = torch.autograd.grad(total.sum(), logprobs)
    assert gradient.tolist() == [0.0] * 20 + [1.0] * 20
    early = torch.tensor([0, 3, 3], device=device)
    (gradient,) = torch.autograd.grad(sequence_logprobs(logprobs, cu_seqlens=early, impl="triton").sum(), logprobs)
    assert gradient.tolist() == [1.0] * 3 + [0.0] * 37


BREAKS = {
    "the mask dropped on the last block": (
        "_segments",
        "inside = inside & (tl.load(mask + index, mask=inside, other=0) != 0)",
        "inside = inside & ((tl.load(mask + index, mask=inside, other=0) != 0) | (tl.max(index, axis=0) >= 32))",
    ),
    "the end of the sequence": (
        "sequence",
        "index = start + tl.arange(0, BLOCK)\n        inside = index < end",
                                "index = start + tl.arange(0, BLOCK)\n        inside = index <= end"),
    "the mean": ("sequence", "tl.maximum(tl.sum(tokens", "tl.maximum(1 + tl.sum(tokens"),
    "the gradient's share": ("sequence", "tl.maximum(count_tokens(mask, begin, end, BLOCK), 1)", "(end - begin)"),
    "the gradient's mask": ("sequence", "tl.where(counts, share, 0.0)", "(share + tl.zeros([BLOCK], tl.float32))"),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed(name: str) -> None:
    def proof() -> None:
        torch.manual_seed(0)
        check("cpu", torch.float32, "packed", "mean", RAGGED)

    assert_noticed(*BREAKS[name], proof)
