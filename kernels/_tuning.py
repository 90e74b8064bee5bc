"""How wide a block of the vocabulary is and how many warps share it, by target, dtype and vocabulary; and the tiles of
the kernel with products inside, by target, dtype, depth and vocabulary.

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


class ProductConfig(NamedTuple):
    """A launch of linear_fused_parts."""

    rows: int  # of a tile of logits
    vocab: int  # its columns
    depth: int  # multiplied at once
    strip: int  # columns that are added to the summaries at once
    splits: int  # of the vocabulary: how many programs a tile of rows has
    num_warps: int
    num_stages: int  # tiles of the operands in shared memory
    descriptors: bool = False  # whether the GPU copies tiles by itself
    matrix: int | None = None  # rows of a matrix instruction, where the compiler asks (AMD)


# Depths of at most this are shallow: adding a logit to its row's summary, 17 instructions of 128 lanes beside 2 x depth
# operations of 4096, takes more than an eighth of the time that its product takes. Two programs a multiprocessor, of
# 128 registers a thread and 98 KiB each, then do one while the other does the other. Deeper, one program with a tile
# twice as wide reads the operands less often.
SHALLOW = 2048

_TILES: dict[tuple[str, int, bool], ProductConfig] = {
    ("sm_80", 2, True): ProductConfig(128, 128, 32, 32, 64, 8, 4),
    ("sm_90", 2, True): ProductConfig(128, 128, 64, 32, 64, 8, 3, descriptors=True),
    ("sm_100", 2, True): ProductConfig(128, 256, 64, 64, 64, 8, 3, descriptors=True),
    ("gfx942", 2, True): ProductConfig(128, 128, 64, 64, 64, 8, 2, matrix=16),
    ("sm_90", 2, False): ProductConfig(128, 256, 64, 32, 64, 8, 4, descriptors=True),
}
for _target in TARGETS:
    _TILES.setdefault((_target, 2, False), _TILES[_target, 2, True])
    for _shallow in (False, True):
        # Exact products of float32 have no matrix unit on NVIDIA's: each thread multiplies, and needs the registers.
        _TILES[_target, 4, _shallow] = ProductConfig(
            *((64, 64, 32, 32, 64, 4, 2) if _target.startswith("gfx") else (32, 64, 32, 32, 64, 4, 2)),
            descriptors=_target in ("sm_90", "sm_100"),
            matrix=16 if _target.startswith("gfx") else None,
        )
# (target, bytes of an element, whether the depth is shallow, whether the vocabulary is narrow).
_PRODUCTS = {
    (*key, narrow): entry._replace(splits=16 if narrow else entry.splits)
    for key, entry in _TILES.items()
    for narrow in (False, True)
}

# Any other GPU; and rows that do not all begin at multiples of 16 bytes, which take loads of one element each.
_PRODUCT_FALLBACK = {
    2: ProductConfig(64, 64, 32, 32, 64, 4, 2),
    4: ProductConfig(32, 64, 32, 32, 64, 4, 2),
}


def target_name(backend: str, arch: int | str) -> str:
    """The name in TARGETS of what triton.runtime.driver.active.get_current_target() says."""
    return f"sm_{arch}" if backend == "cuda" else str(arch).partition(":")[0]


def _known(target: str) -> str:
    """A newer NVIDIA GPU takes the entries of the last one known."""
    if target.startswith("sm_") and target not in TARGETS:
        older = [name for name in TARGETS if name.startswith("sm_") and int(name[3:]) <= int(target[3:])]
        return older[-1] if older else target
    return target


@cache
def config(kernel: str, target: str, element_bytes: int, vocab: int) -> Config:
    """The launch configuration for rows of `vocab` logits."""
    entry = _TABLE.get((kernel, _known(target), element_bytes, vocab <= NARROW))
    return entry or _FALLBACK[element_bytes]


@cache
def product_config(target: str, element_bytes: int, depth: int, vocab: int, aligned: bool) -> ProductConfig:
    """That of linear_fused_parts; aligned: whether all rows of both operands begin at multiples of 16 bytes.

    A newer GPU may have other instructions for products, with which nothing here was compiled: it takes the fallback.
    """
    narrow = vocab <= NARROW
    entry = _PRODUCTS.get((target, element_bytes, depth <= SHALLOW, narrow)) if aligned else None
    entry = entry or _PRODUCT_FALLBACK[element_bytes]._replace(matrix=16 if target.startswith("gfx") else None)
    return entry._replace(splits=16) if narrow else entry


def table() -> dict[tuple[str, str, int, bool], Config]:
    """A copy of all entries, for the tests that compile each of them."""
    return dict(_TABLE)


def product_table() -> dict[tuple[str, int, bool, bool], ProductConfig]:
    """The same of linear_fused_parts."""
    return dict(_PRODUCTS)
