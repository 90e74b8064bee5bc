"""Memory of large results on the CPU that keeps its pages.

glibc hands every large block back to the kernel when it is freed, and a new one is faulted in again page by page: for a
gradient of the logits' size that takes longer than computing it. So gradients of logits, and logits kept for backward,
lie in blocks of irlfast's own, on huge pages where the system has them; when the last tensor on such a block is gone,
the block waits for the next one of about its size. At most 512 MiB wait so, unless `set_warm_memory_limit` says
otherwise: 0 gives every block back at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from irlfast import _native

# Below two huge pages there may be none inside, and the C library keeps such blocks itself.
WARM_FROM = 4 << 20


def warm_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor, not yet written: on a warm block where it is large."""
    count = math.prod(shape)
    if count * dtype.itemsize < WARM_FROM:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_native.warm_block(count * dtype.itemsize), dtype=dtype).view(shape)


def set_warm_memory_limit(limit: int) -> None:
    """Keep at most `limit` bytes of blocks that nobody uses; those beyond go back to the system now.

    Raises:
        ValueError: limit is negative.
    """
    if limit < 0:
        raise ValueError(f"limit is {limit}; expected a number of bytes, 0 to keep none")
    _native.set_warm_memory_limit(limit)


def warm_memory_held() -> int:
    """Bytes of blocks that nobody uses and that are kept for the next large result."""
    return _native.warm_memory_held()
