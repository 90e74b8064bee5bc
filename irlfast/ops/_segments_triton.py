"""How sequences, masks and numbers reach the Triton kernels over segments; nothing here waits for the device."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from irlfast.ops._segments import MASK_WORDS, checked_offsets
from irlfast.ops._triton import DTYPES, triton_unavailable

# offsets or None, sequences, width of each without offsets, tokens.
Layout = tuple[Tensor | None, int, int, int]

# Kernel -> tokens of a block and warps: in float32 16 bytes of an array a thread, 8 of AMD's, whose warps are twice as
# wide. One a kernel, whatever the lengths, so that neither batch nor padding shows in a result. Predicted, unmeasured:
# from the registers that the compiler reports.
BLOCKS = {
    "sequence": (1024, 8),
    "gae": (512, 4),
    "importance": (512, 4),
    "policy_terms": (1024, 8),
    "policy_terms float64": (256, 4),
    "policy_sums": (256, 4),
}


@lru_cache(maxsize=256)
def bits(value: float) -> int:
    """A float64 as the integer of the same bits: Triton takes a Python float for a float32."""
    result: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return result


def words(mask: Tensor | None) -> Tensor | None:
    """A mask that a kernel can compare with 0, in bytes where it is boolean."""
    if mask is None:
        return None
    if mask.dtype not in MASK_WORDS:
        mask = mask.bool()
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def layout(shape: torch.Size, cu_seqlens: Tensor | None) -> Layout:
    """The sequences of a padded [B, T] or packed [N] tensor.

    Offsets on a GPU are not looked at: the kernel holds them within the tensor.
    """
    if cu_seqlens is None:
        return None, shape[0], shape[1], shape[0] * shape[1]
    if cu_seqlens.is_cpu:
        cu_seqlens = checked_offsets(cu_seqlens, shape[0], cu_seqlens.device)
    return cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1, 0, shape[0]


def triton_takes(tensor: Tensor) -> str | None:
    """Why the Triton kernels over segments, which know float64 too, cannot take a tensor."""
    return triton_unavailable(tensor, (*DTYPES, torch.float64))
