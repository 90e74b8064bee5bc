"""The CUDA token_kl, through the public op: the Triton kernel's tests, and what is CUDA's own."""

from __future__ import annotations

import pytest
import torch
from reuse import reuse
from torch import Tensor
from triton_cases import error, near_pair, rounding

from irlfast.ops import token_kl, token_kl_reference

globals().update(reuse("test_token_kl"))

ALL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["reverse", "forward", "js"]


def differentiated(logits: Tensor, ref_logits: Tensor, kind: str, impl: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (logits, ref_logits)]
    kl = token_kl(*leaves, kind=kind, impl=impl)  # type: ignore[arg-type]
    return [kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1021, 2503, 20011])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_every_size_of_block(device: str, dtype: torch.dtype, vocab: int, kind: str) -> None:
    torch.manual_seed(10)
    pair = [x.to(device, dtype) for x in near_pair(2, vocab)]
    ours = differentiated(*pair, kind, "cuda")
    exact = differentiated(*(x.cpu().double() for x in pair), kind, "reference")
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    share = 0.0 if dtype == torch.float64 else rounding(dtype, "cuda")
    for mine, truth, relative in zip(ours, exact, (0.0, share, share), strict=True):
        assert error(mine, truth, relative) <= slack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [(0, 0), (1, 1), (0, 1), (3, 6)])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_rows_at_any_address(device: str, dtype: torch.dtype, begin: tuple[int, int], kind: str) -> None:
    """Both as far from a multiple of 16 bytes, and not."""
    torch.manual_seed(11)
    pair = [torch.randn(2, 340, device=device).to(dtype)[:, i : i + 333] for i in begin]
    ours = differentiated(*pair, kind, "cuda")
    exact = differentiated(*(x.cpu().double() for x in pair), kind, "reference")
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    share = 0.0 if dtype == torch.float64 else rounding(dtype, "cuda")
    for mine, truth, relative in zip(ours, exact, (0.0, share, share), strict=True):
        assert error(mine, truth, relative) <= slack


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_blocks(device: str, kind: str) -> None:
    torch.manual_seed(12)
    pair = [x.to(device, torch.float32) for x in near_pair(70, 11)]
    exact = token_kl_reference(*(x.double() for x in pair), kind=kind)
    assert error(token_kl(*pair, kind=kind, impl="cuda"), exact) <= 2e-6  # type: ignore[arg-type]
