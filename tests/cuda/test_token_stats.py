"""The CUDA token_stats, through the public op: the Triton kernel's tests, and what is CUDA's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reuse import reuse
from torch import Tensor
from triton_cases import certain_logits, error, masked_logits, random_logits, rounding, tied_logits

from irlfast.ops import token_logprobs, token_stats, token_stats_reference

# It asks for the same bits, which CUDA's rows have where they begin alike; its own is below.
globals().update(reuse("test_token_stats", but=("test_offsets_have_64_bits",)))

ALL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def differentiated(logits: Tensor, labels: Tensor, impl: str, **options: float | Tensor | None) -> list[Tensor]:
    """Statistics, and the gradient of their sum, weighted by 1, 0.3 and -0.7."""
    leaf = logits.detach().requires_grad_()
    options = {name: x.to(logits.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    stats = token_stats(leaf, labels, impl=impl, **options)  # type: ignore[arg-type]
    weights = [torch.full_like(s, w) for s, w in zip(stats, (1.0, 0.3, -0.7), strict=True)]
    return [*(s.detach() for s in stats), *torch.autograd.grad(list(stats), leaf, weights)]


# Rows for 32, 64, 128 and 256 threads, with places left over: a thread has two packs of 16 bytes at a time.
@pytest.mark.parametrize("make", [random_logits, masked_logits, certain_logits, tied_logits])
@pytest.mark.parametrize("vocab", [509, 1021, 2503, 5011, 20011])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_every_size_of_block(device: str, dtype: torch.dtype, vocab: int, make: Callable[..., Tensor]) -> None:
    torch.manual_seed(10)
    logits = make(3, vocab).to(device, dtype)
    labels = torch.tensor([0, vocab - 1, int(logits[2].argmax())], device=device)
    ours = differentiated(logits, labels, "cuda")
    eager = differentiated(logits.cpu().to(ours[0].dtype), labels.cpu(), "reference")
    exact = differentiated(logits.cpu().double(), labels.cpu(), "reference")
    slack = 1e-12 if dtype == torch.float64 else 5e-6
    for mine, plain, truth in zip(ours[:3], eager[:3], exact[:3], strict=True):
        assert error(mine, truth) <= error(plain, truth) + slack
    share = 0.0 if dtype == torch.float64 else rounding(dtype, "cuda")
    assert error(ours[3], exact[3], share) <= error(eager[3], exact[3]) + slack


@pytest.mark.parametrize("begin", range(9))
@pytest.mark.parametrize("vocab", [1, 5, 131, 1000])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_rows_at_any_address(device: str, dtype: torch.dtype, vocab: int, begin: int) -> None:
    """Before the first multiple of 16 bytes and after the last, and where the gradient begins at another."""
    torch.manual_seed(11)
    logits = torch.randn(3, vocab + 9, device=device).to(dtype)[:, begin : begin + vocab]
    labels = torch.tensor([0, vocab // 2, vocab - 1], device=device)
    ours = differentiated(logits, labels, "cuda", softcap=7.0)
    exact = differentiated(logits.cpu().double(), labels.cpu(), "reference", softcap=7.0)
    slack = 1e-12 if dtype == torch.float64 else 3e-6
    share = 0.0 if dtype == torch.float64 else rounding(dtype, "cuda")
    for mine, truth, relative in zip(ours, exact, (0.0, 0.0, 0.0, share), strict=True):
        assert error(mine, truth, relative) <= slack


def test_more_rows_than_blocks(device: str) -> None:
    """Short rows are shared out among as many blocks as run at once; in the emulation that is 32."""
    torch.manual_seed(12)
    rows = 70 if device == "cpu" else 70_000
    logits, labels = torch.randn(rows, 11, device=device), torch.randint(11, (rows,), device=device)
    labels[::5] = -100
    exact = token_stats_reference(logits.double(), labels)
    for mine, truth in zip(token_stats(logits, labels, impl="cuda"), exact, strict=True):
        assert error(mine, truth) <= 2e-6


@pytest.mark.parametrize("count", [33, 1024])
def test_as_many_labels_as_are_taken(device: str, count: int) -> None:
    torch.manual_seed(13)
    logits = torch.randn(2, 70, device=device, requires_grad=True)
    labels = torch.randint(70, (2, count), device=device)
    weights = torch.rand(2, count, device=device)
    runs = []
    for impl, leaf in (("cuda", logits), ("reference", logits.detach().cpu().double().requires_grad_())):
        logprobs = token_logprobs(leaf, labels.to(leaf.device), impl=impl)
        runs.append((logprobs, torch.autograd.grad(logprobs, leaf, weights.to(logprobs))[0]))
    assert error(runs[0][0], runs[1][0]) <= 2e-6
    assert error(runs[0][1], runs[1][1]) <= 1e-4  # of sums of a thousand


def test_offsets_have_64_bits(device: str) -> None:
    """Strides of 32 bits, and a third row beyond them. Of 4 GiB of logits the rows alone are touched."""
    torch.manual_seed(9)
    logits = random_logits(3, 70).to(device, torch.bfloat16)
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=device).as_strided((3, 70), (2**30 + 16, 1))
    far.copy_(logits)
    labels = torch.tensor([3, 69, 5], device=device)
    near = token_stats(logits, labels, impl="cuda")
    for mine, other in zip(token_stats(far, labels, impl="cuda"), near, strict=True):
        assert error(mine, other) <= 1e-6  # rows begin at other addresses, so sums run in another order


def test_errors_of_long_rows_do_not_grow(device: str) -> None:
    """Flat rows, whose sums are the longest."""
    torch.manual_seed(14)
    logits, labels = torch.randn(2, 128256).to(device), torch.tensor([3, 77], device=device)
    exact = token_stats_reference(logits.double(), labels)
    for mine, truth in zip(token_stats(logits, labels, impl="cuda"), exact, strict=True):
        assert error(mine, truth) <= 3e-6
