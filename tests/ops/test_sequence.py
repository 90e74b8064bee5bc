"""ops.sequence_logprobs: values, padded against packed, empty sequences, garbage under the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast import _native
from irlfast.ops import sequence_logprobs
from irlfast.ops.sequence import backward_cpu, forward_cpu, sequence_logprobs_reference


def _ragged(lengths: list[int], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One set of sequences both ways: padded values [B, T] with NaN padding, their mask, packed values, offsets."""
    generator = torch.Generator().manual_seed(seed)
    rows = [-torch.rand(n, generator=generator, dtype=dtype) * 8 for n in lengths]
    padded = torch.full((len(lengths), max(lengths, default=0)), torch.nan, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.cat(rows) if rows else torch.zeros(0, dtype=dtype)
    return padded, ~padded.isnan(), packed, offsets


def test_values_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert sequence_logprobs(logprobs).tolist() == [-7.0, -15.0]
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -7.0]
    assert sequence_logprobs(logprobs, mask, reduction="mean").tolist() == [-1.5, -7.0]
    packed, offsets = logprobs.flatten(), torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    assert sequence_logprobs(packed, cu_seqlens=offsets).tolist() == [-3.0, 0.0, -19.0]
    assert sequence_logprobs(packed, mask.flatten(), cu_seqlens=offsets, reduction="mean").tolist() == [-1.5, 0.0, -7.0]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    padding=st.integers(0, 40),
    reduction=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 2**16),
)
def test_padded_packed_and_reference_agree(lengths: list[int], padding: int, reduction: str, seed: int) -> None:
    padded, mask, packed, offsets = _ragged(lengths, seed)
    padded = torch.nn.functional.pad(padded, (0, padding), value=torch.inf)
    mask = torch.nn.functional.pad(mask, (0, padding))
    want = sequence_logprobs_reference(packed, cu_seqlens=offsets, reduction=reduction)
    torch.testing.assert_close(sequence_logprobs_reference(padded, mask, reduction=reduction), want)
    for got in (
        sequence_logprobs(padded, mask, reduction=reduction),
        sequence_logprobs(packed, cu_seqlens=offsets, reduction=reduction),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2e-7, atol=0)  # one rounding to float32


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_sequence_gives_zero_and_garbage_gets_no_gradient(reduction: str) -> None:
    logprobs = torch.tensor([[-1.0, torch.nan], [-torch.inf, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    result = sequence_logprobs(logprobs, mask, reduction=reduction)
    assert result.tolist() == [-1.0, 0.0]
    result.sum().backward()
    assert logprobs.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck(reduction: str) -> None:
    torch.manual_seed(0)
    padded = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]])
    packed = torch.randn(7, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 7])
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, mask, reduction=reduction), padded)
    assert torch.autograd.gradcheck(lambda x: sequence_logprobs(x, cu_seqlens=offsets, reduction=reduction), packed)


def test_long_low_precision_sequence_is_accumulated_exactly() -> None:
    """8,193 tokens of -0.1 in bfloat16: a bfloat16 running sum stops at -32, a float32 one drifts."""
    logprobs = torch.full((1, 8193), -0.1, dtype=torch.bfloat16)
    want = 8193 * float(logprobs[0, 0])
    got = sequence_logprobs(logprobs)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(want, rel=1e-7)


def test_impossible_token_makes_the_sequence_impossible_and_no_other() -> None:
    packed = torch.tensor([-1.0, -torch.inf, -2.0])
    assert sequence_logprobs(packed, cu_seqlens=torch.tensor([0, 2, 3])).tolist() == [-torch.inf, -2.0]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_rows_or_no_columns(shape: tuple[int, int]) -> None:
    assert sequence_logprobs(torch.zeros(shape), torch.ones(shape)).tolist() == [0.0] * shape[0]
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
    assert sequence_logprobs(torch.zeros(0), cu_seqlens=offsets).tolist() == [0.0] * shape[0]


def test_compiles_without_a_break() -> None:
    logprobs, mask, packed, offsets = _ragged([3, 0, 5], seed=0)
    padded = torch.compile(sequence_logprobs, fullgraph=True, backend="aot_eager")
    assert torch.equal(padded(logprobs, mask), sequence_logprobs(packed, cu_seqlens=offsets))


def test_errors() -> None:
    packed = torch.zeros(4)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\); expected that of logprobs, \(2, 3\)"):
        sequence_logprobs(torch.zeros(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"logprobs has shape \(4,\); expected padded \[B, T\]"):
        sequence_logprobs(packed)
    with pytest.raises(ValueError, match=r"expected packed \[N\], as cu_seqlens is given"):
        sequence_logprobs(torch.zeros(2, 2), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 3; expected from 0 to 4"):
        sequence_logprobs(packed, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens falls from 3 to 2 at sequence 1"):
        sequence_logprobs(packed, cu_seqlens=torch.tensor([0, 3, 2, 4]))
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch.float32; expected integer offsets"):
        sequence_logprobs(packed, cu_seqlens=torch.tensor([0.0, 4.0]))
    with pytest.raises(ValueError, match="reduction is 'max'; expected one of"):
        sequence_logprobs(torch.zeros(2, 2), reduction="max")
    with pytest.raises(TypeError, match=r"logprobs has dtype torch.int64"):
        sequence_logprobs(torch.zeros(2, 2, dtype=torch.int64))


ISAS = _native.build_info()["isas_usable"]
MASK_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
]


# 1024 and 1025: a whole block of the widest float vectors, and one token more; 64 +- 1: its unrolled step.
@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 1024, 1025, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_dtype(isa: str, dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(length)
    logprobs = (-torch.rand(3, length, dtype=torch.float64) * 8).to(dtype)
    mask = torch.rand(3, length) > 0.3
    for mean in (False, True):
        got = forward_cpu(logprobs, mask, None, mean, isa=isa)
        reduction = "mean" if mean else "sum"
        want = sequence_logprobs_reference(logprobs.double(), mask, reduction=reduction)
        tolerance = 1e-14 if dtype == torch.float64 else 1.2e-7  # sums in float64, rounded once
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-14)
        upstream = torch.randn(3, dtype=got.dtype)
        gradient = backward_cpu(upstream, mask, None, mean, logprobs.shape, dtype, isa=isa)
        share = upstream / mask.sum(1).clamp(min=1) if mean else upstream
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, torch.where(mask, share[:, None], 0.0).to(dtype), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_a_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    logprobs = torch.randn(3, 1100)
    mask = torch.rand(3, 1100) > 0.5
    words = torch.where(mask, 0.25, -0.0).to(dtype) if dtype.is_floating_point else mask.to(dtype) * 64
    assert torch.equal(
        sequence_logprobs(logprobs, words, reduction="mean"), sequence_logprobs(logprobs, mask, reduction="mean")
    )


def test_thread_count_layout_and_neighbours_do_not_matter() -> None:
    torch.manual_seed(0)
    logprobs, mask = torch.randn(300, 700), torch.rand(300, 700) > 0.3
    want = sequence_logprobs(logprobs, mask)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sequence_logprobs(logprobs, mask), want)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sequence_logprobs(logprobs.t().contiguous().t(), mask.t().contiguous().t()), want)
    assert torch.equal(sequence_logprobs(logprobs[7:9], mask[7:9]), want[7:9])
    wide = torch.nn.functional.pad(logprobs, (0, 333), value=torch.nan)
    assert torch.equal(sequence_logprobs(wide, torch.nn.functional.pad(mask, (0, 333))), want)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_second_derivative(impl: str) -> None:
    """The op is linear, so that of its square is exact."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    logprobs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: sequence_logprobs(x, mask, reduction="mean", impl=impl).square(), logprobs
    )


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 2, 2, 6]), torch.tensor([0, 2, 2, 6], dtype=torch.int32)])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, offsets: Tensor | None) -> None:
    logprobs = torch.randn(6) if offsets is not None else torch.randn(2, 3)
    mask = torch.rand(logprobs.shape) > 0.3
    arguments = (logprobs.requires_grad_(grad), mask, offsets, True)
    torch.library.opcheck(torch.ops.irlfast.sequence_logprobs.default, arguments)


def test_compiled_gradient_without_a_break() -> None:
    logprobs, mask, packed, offsets = _ragged([3, 0, 5], seed=0)

    def loss(values: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Tensor:
        return sequence_logprobs(values, mask, cu_seqlens=offsets, reduction="mean").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for values, m, o in ((logprobs, mask, None), (packed, None, offsets)):
        leaf = values.detach().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, m, o), leaf)
        (got,) = torch.autograd.grad(compiled(leaf, m, o), leaf)
        assert torch.equal(got, want)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="impl='gpu' is unknown"):
        sequence_logprobs(torch.zeros(1, 1), impl="gpu")
    with pytest.raises(RuntimeError, match="impl='triton' is not available"):
        sequence_logprobs(torch.zeros(1, 1), impl="triton")
