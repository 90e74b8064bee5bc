"""Matrix products whose results are float32 whatever the operands are, for the linear ops.

Logits rounded to bfloat16 are wrong by 1e-2 before anything is made of them. torch.mm gives results in the operands'
type on the CPU, so narrow operands are widened, a block of the larger one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to write a factor in that is made for the next product with operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N], or out + that. Sums are in float32 (float64 for float64) and rounded to out."""
    dtype = operand_dtype(a.dtype)
    if out.dtype != dtype:
        wide = out.to(dtype) if accumulate else out.new_empty(out.shape, dtype=dtype)
        return out.copy_(product(a, b, wide, accumulate=accumulate))
    a, b = a.to(dtype), b.to(dtype)
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
