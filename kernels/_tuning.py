"""How wide a block of the vocabulary is and how many warps share it, by target, dtype and vocabulary.

Every entry is predicted, unmeasured: reckoned from the bytes that a load in flight has to cover and the registers the
compiler reports, on no GPU. Results depend on a configuration in the order of sums alone: another block adds the same
terms in another order, which moves the last bits of a row. The number of rows is no key, so a row has the same bits in
every batch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Config(NamedTuple):
    """A launch of a kernel over a vocabulary."""

    block: int  # logits of a row read at once
    num_warps: int
    num_stages: int = 1  # loads feed no matrix product, and Triton pipelines no others by itself


# Of GPUs that a table was made for: NVIDIA by compute capability, AMD by architecture.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Rows of at most this many logits are narrow: a wide block would be mostly empty.
NARROW = 8192

# (kernel, target, bytes of a logit, whether the row is narrow). Two loads of 16 bytes a thread and block keep about
# 32 KiB in flight a multiprocessor, which covers a read of 700 ns at 40 bytes a ns.
_TABLE: dict[tuple[str, str, int, bool], Config] = {}
for _kernel in ("token_stats", "token_kl"):
    for _target in TARGETS:
        _warps = 4 if _target.startswith("gfx") else 8  # 256 threads either way
        for _bytes in (2, 4):
            _loads = 2 if _kernel == "token_stats" else 1  # two rows are read at once as it is
            _TABLE[_kernel, _target, _bytes, False] = Config(_loads * 256 * 16 // _bytes, _warps)
            _TABLE[_kernel, _target, _bytes, True] = Config(64 * 16 // _bytes * _loads, _warps // 4)
# Chunks of the linear ops are float32, and a piece of their columns is one block: each block ends in a reduction.
for _kernel in ("linear_token_stats", "linear_policy_ref_stats"):
    for _target in TARGETS:
        for _narrow in (False, True):
            _TABLE[_kernel, _target, 4, _narrow] = Config(2048, 4 if _target.startswith("gfx") else 8)

# A kernel, GPU or dtype that is not in the table: one load of 16 bytes for each of 128 threads.
_FALLBACK = {2: Config(1024, 4), 4: Config(512, 4)}


def target_name(backend: str, arch: int | str) -> str:
    """The name in TARGETS of what triton.runtime.driver.active.get_current_target() says."""
    return f"sm_{arch}" if backend == "cuda" else str(arch).partition(":")[0]


@cache
def config(kernel: str, target: str, element_bytes: int, vocab: int) -> Config:
    """The launch configuration for rows of `vocab` logits; a newer NVIDIA GPU takes the entry of the last one known."""
    if target.startswith("sm_") and target not in TARGETS:
        older = [name for name in TARGETS if name.startswith("sm_") and int(name[3:]) <= int(target[3:])]
        target = older[-1] if older else target
    entry = _TABLE.get((kernel, target, element_bytes, vocab <= NARROW))
    return entry or _FALLBACK[element_bytes]


def table() -> dict[tuple[str, str, int, bool], Config]:
    """A copy of all entries, for the tests that compile each of them."""
    return dict(_TABLE)
