"""Matrix products whose sums are float32 whatever the operands are, for the linear ops.

Logits rounded to bfloat16 are wrong by 1e-2 before anything is made of them, and on the CPU torch.mm rounds its result
to the operands' type. How each pair of operands is multiplied, and how far an element may be off, in units of
u = 2^-24 times sum_k |a_k b_k|, to first order; K is the number of terms:

    float32, float64         torch.mm: its own
    bfloat16, CPU            the native product where the processor has AVX512_BF16: exact products, at most
                             min(K, 1024) + K / 1024 units, below 8 in practice. An element has the same bits whatever
                             the other rows and columns are, and for any number of threads; subnormal numbers are 0
    bfloat16, float16, CUDA  torch.mm(out_dtype=torch.float32), where torch has it; sums are added to by torch.addmm, in
                             the product itself, where torch lets it
    anything else            torch.mm of float32 copies, a block at a time: exact products, at most K units

A result asked for in bfloat16 or float16 is rounded once, at the end.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import DTYPE_CODES

_NATIVE = _native.bf16_product_available()
_CUDA_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
_CUDA_ADDS = "dtype_out" in torch.ops.aten.addmm.overloads()
_NATIVE_OUT = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)

# Elements of an operand that are widened at a time: 4 MiB of float32.
_BLOCK = 1 << 20


def operand_dtype(operand: Tensor) -> torch.dtype:
    """The type to write a factor in that is made for the next product with `operand`: its own where that is fast."""
    if _multiplies_narrow(operand):
        return operand.dtype
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def adds_in_place(operand: Tensor) -> bool:
    """Whether product(accumulate=True) of two such operands to their wide sums takes no memory of its own."""
    if operand.device.type != "cuda" or not _multiplies_narrow(operand):
        return True
    if torch._C._len_torch_dispatch_stack():  # nothing runs: somebody traces, or plans
        return _CUDA_ADDS
    return _cuda_adds(operand.device.index, operand.dtype)


def rounds_at_the_end(operand: Tensor) -> bool:
    """Whether product() of two such operands writes 16 bits, rounded once, without float32 sums in memory."""
    return operand.device.type == "cpu" and _multiplies_narrow(operand)


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False, sums: Tensor | None = None) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N], or out + that, outside autograd.

    Args:
        a, b: of one device, and of one type or float32 and a narrower one. Rows or columns adjacent; anything else is
            copied first.
        out: float32 (float64 for float64 operands), or narrower. Its rows do not overlap, nor does it a or b.
        sums: memory of at least M N float32, for operands that do not add in place; None allocates it.

    Returns:
        out.

    Raises:
        ValueError: shapes that do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(
            f"product: shapes {tuple(a.shape)} @ {tuple(b.shape)} -> {tuple(out.shape)}, expected [M, K] @ [K, N] -> "
            "[M, N]"
        )
    narrow = a.dtype == b.dtype and _multiplies_narrow(a)
    if narrow and a.device.type != "cpu":
        return _cuda(a, b, out, accumulate, sums)
    if narrow and out.dtype in _NATIVE_OUT and (out.stride(1) == 1 or out.shape[1] == 1):
        return _bf16_cpu(a, b, out, accumulate)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    if narrow or out.dtype != wide:
        wide_out = out.new_empty(out.shape, dtype=wide)
        if accumulate:
            wide_out.copy_(out)
        return out.copy_(product(a, b, wide_out, accumulate=accumulate))
    if a.dtype == b.dtype == wide:
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    return _widened(a, b, out, accumulate)


def _multiplies_narrow(operand: Tensor) -> bool:
    """Whether two such operands are multiplied as they are."""
    if operand.device.type == "cpu":
        return _NATIVE and operand.dtype == torch.bfloat16
    return _CUDA_OUT_DTYPE and operand.device.type == "cuda" and operand.dtype in _HALVES


def _bf16_cpu(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    a, b = _adjacent(a), _adjacent(b)
    _native.bf16_product(
        a.data_ptr(),
        a.stride(),  # type: ignore[arg-type]  # two, as a has two dimensions
        b.data_ptr(),
        b.stride(),  # type: ignore[arg-type]
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODES[out.dtype],
        (a.shape[0], b.shape[1], a.shape[1]),
        accumulate,
        torch.get_num_threads(),
    )
    return out


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _cuda(a: Tensor, b: Tensor, out: Tensor, accumulate: bool, memory: Tensor | None) -> Tensor:
    if out.dtype == torch.float32 and not accumulate:
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    if out.dtype == torch.float32 and adds_in_place(a):
        return torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    sums = out.new_empty(out.shape, dtype=torch.float32) if memory is None else memory[: out.numel()].view(out.shape)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=sums)
    return out.add_(sums) if accumulate else out.copy_(sums)


@cache
def _cuda_adds(index: int | None, dtype: torch.dtype) -> bool:
    """Some versions of torch have the overload, and refuse sums in another type than the operands'."""
    if not _CUDA_ADDS:
        return False
    operand = torch.zeros(16, 16, dtype=dtype, device=torch.device("cuda", index or 0))
    sums = torch.zeros(16, 16, device=operand.device)
    try:
        torch.ops.aten.addmm.dtype_out(sums, operand, operand, torch.float32, out=sums)
    except RuntimeError:  # said before anything is launched
        return False
    return True


def _widened(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    for columns in _blocks(b.shape[1], b, out.dtype):
        right = b[:, columns].to(out.dtype)
        for rows in _blocks(a.shape[0], a, out.dtype):
            part = out[rows, columns]
            left = a[rows].to(out.dtype)
            if accumulate:
                part.addmm_(left, right)
            else:
                torch.mm(left, right, out=part)
    return out


def _blocks(count: int, operand: Tensor, wide: torch.dtype) -> list[slice]:
    """All rows or columns at once where nothing is copied, else as many as fill a block."""
    depth = operand.numel() // count if count else 0
    block = count if operand.dtype == wide else max(64, _BLOCK // max(depth, 1))
    return [slice(begin, min(begin + block, count)) for begin in range(0, count, max(block, 1))]
