"""What the linear ops allocate, decided before anything runs: sizes of blocks, and every buffer with its bytes.

The loops of `_linear` take their buffers from a `Plan`, so that what a plan says is what a pass needs. Beside its
buffers a pass makes vectors with one element a row or column, for which the plan allows ROW_BYTES and COLUMN_BYTES. Not
in it: copies of operands that `_product` makes, 4 MiB at a time, where nothing multiplies them as they are.

A block is some rows times some columns (a chunk) of the logits. With N rows, depth D, V columns, blocks of R x C, dX
summed over the chunks and dW over the blocks of rows, the sums in float32 are read and written

    8 N D V / C + 8 V D N / R bytes, beside the logits' 8 N V, their gradient's 2 N V written and as much read a product

if the logits do not stay in the cache. On a GPU the sizes are those of the least predicted time that fit the workspace;
on the CPU they are fixed, as measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._dispatch import statistics_dtype
from irlfast.ops._product import adds_in_place, operand_dtype, rounds_at_the_end

# Chunks begin at multiples of this many columns. An epilogue sums over whole pieces, whatever the chunks.
PIECE = _native.CHUNK_PIECE

# On the CPU: fewer columns make the products slower, more fall out of the caches; enough logits for the products to run
# at full speed, and no more memory.
CHUNK = 2048
SCRATCH_BYTES = 16 << 20

# On a GPU: all buffers but the sums of dX and what a mode keeps. With those of dX, 512 MiB for 32768 rows of 4096, that
# is 768 MiB.
GPU_WORKSPACE_BYTES = 256 << 20
# Of kept logits, whose chunks forward and backward have to agree on.
GPU_KEPT_CHUNK = 8192
GPU_CHUNKS = 8  # pieces that a chunk has at most
TILE = 128  # rows of a block are a multiple of it, as products are made of tiles

# What the sizes of blocks are chosen by, on any GPU: a rate and a bandwidth that products and sweeps reach on the
# fastest, and how long the host takes for one block. Predicted; only their ratios matter.
RATE, BANDWIDTH, HOST_SECONDS = 700e12, 4e12, 100e-6
CACHE_BYTES = 50 << 20  # where the device does not say
CACHE_SHARE = 0.5  # of the cache that a block of logits may fill and still be found there

# Vectors with one element a row or column, at the most, whatever the mode.
ROW_BYTES, COLUMN_BYTES = 256, 24


class Buffer(NamedTuple):
    """An allocation; `shape` in elements of `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One pass: the rows and columns worked on at a time, and all that is allocated beside inputs and gradients.

    Attributes:
        count: rows that the pass goes over.
        kept: what forward leaves for backward besides a few numbers a row; alive in both passes.
    """

    rows: int
    columns: int
    count: int
    buffers: tuple[Buffer, ...]
    kept: Buffer | None = None

    @property
    def vector_bytes(self) -> int:
        """What vectors may take, at the most."""
        return ROW_BYTES * self.count + COLUMN_BYTES * self.columns

    @property
    def nbytes(self) -> int:
        """Peak of the pass above inputs and gradients."""
        kept = 0 if self.kept is None else self.kept.nbytes
        return sum(buffer.nbytes for buffer in self.buffers) + kept + self.vector_bytes

    def new(self, name: str, like: Tensor) -> Tensor | None:
        """The buffer, uninitialised, on a tensor's device; None where the pass has none of that name."""
        for buffer in self.buffers:
            if buffer.name == name:
                return like.new_empty(buffer.shape, dtype=buffer.dtype)
        return None

    def chunks(self, vocab: int) -> list[tuple[int, int]]:
        """(first column, end) of each."""
        return [(begin, min(begin + self.columns, vocab)) for begin in range(0, vocab, self.columns)]

    def blocks(self, count: int) -> list[slice]:
        return [slice(begin, min(begin + self.rows, count)) for begin in range(0, count, self.rows)]

    def describe(self) -> str:
        """A line for each allocation, largest first."""
        lines = [f"blocks of {self.rows} x {self.columns}, {len(self.blocks(self.count))} of rows"] if self.rows else []
        buffers = [*self.buffers, *([] if self.kept is None else [self.kept])]
        for buffer in sorted(buffers, key=lambda b: -b.nbytes):
            shape = " x ".join(map(str, buffer.shape))
            lines.append(f"{buffer.nbytes / 2**20:9.2f} MiB  {buffer.name} [{shape}] {buffer.dtype}")
        lines.append(f"{self.vector_bytes / 2**20:9.2f} MiB  vectors, at most")
        lines.append(f"{self.nbytes / 2**20:9.2f} MiB  in all")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a plan depends on.

    Attributes:
        rows, depth, vocab: N, D, V.
        dtype: of hidden states and head.
        factors: the type that the logits' gradient is written in, for the products that follow.
        gpu: whether the sizes of blocks are those of a GPU.
        cache_bytes: of a GPU's L2.
        adds: whether a product adds to what its result holds without a buffer.
        rounds: whether a product writes results of 16 bits without a buffer, rounded once.
    """

    rows: int
    depth: int
    vocab: int
    dtype: torch.dtype
    factors: torch.dtype
    gpu: bool = False
    cache_bytes: int = CACHE_BYTES
    adds: bool = True
    rounds: bool = False

    @classmethod
    def of(cls, hidden: Tensor, vocab: int, rows: int) -> Sizes:
        """Those of a call on some of the rows of hidden states [N, D]."""
        return cls(
            rows=rows,
            depth=hidden.shape[1],
            vocab=vocab,
            dtype=hidden.dtype,
            factors=operand_dtype(hidden),
            gpu=hidden.is_cuda,
            cache_bytes=_cache_bytes(hidden.device.index) if hidden.is_cuda else CACHE_BYTES,
            adds=adds_in_place(hidden),
            rounds=rounds_at_the_end(hidden),
        )

    @property
    def wide(self) -> torch.dtype:
        return statistics_dtype(self.dtype)


@cache
def _cache_bytes(index: int | None) -> int:
    if not torch.cuda.is_available():  # a tensor that only claims to be there
        return CACHE_BYTES
    reported = getattr(torch.cuda.get_device_properties(index or 0), "L2_cache_size", 0)
    return int(reported) or CACHE_BYTES


def whole_pieces(chunk: int) -> int:
    return -(-chunk // PIECE) * PIECE


def plan_forward(sizes: Sizes, mode: str, chunk: int = 0, *, models: int = 1, of: int | None = None) -> Plan:
    """Statistics.

    chunk: columns, in whole pieces; 0 leaves them to the plan. models: 2 for a pair. of: rows of the input, of which
    sizes.rows were found and are copied.
    """
    of = sizes.rows if of is None else of
    expects, keeps, compacted = mode == "frozen", mode == "keep", of > sizes.rows
    narrow = expects and sizes.factors != sizes.wide
    passes = _Pass(
        element=(0 if keeps else models * sizes.wide.itemsize) + narrow * sizes.factors.itemsize,
        moved=2 * models * sizes.wide.itemsize + expects * 2 * sizes.factors.itemsize,
        logits=models,
        hidden=expects,
        weight=False,
        hidden_moves=16,  # rescaled besides
    )
    rows, columns = _blocks(sizes, passes, chunk, keeps)
    size = _size(sizes, rows, columns)
    buffers = [Buffer("running", (4 if models == 1 else 9, sizes.rows), torch.float64)]
    if not keeps:
        buffers.append(Buffer("logits", (size,), sizes.wide))
    if models == 2:
        buffers.append(Buffer("reference logits", (size,), sizes.wide))
    if narrow:
        buffers.append(Buffer("factors", (size,), sizes.factors))
    if compacted:
        buffers.append(Buffer("compacted hidden", (sizes.rows, sizes.depth), sizes.dtype))
    if compacted and expects:
        buffers.append(Buffer("compacted expectation", (sizes.rows, sizes.depth), sizes.wide))
    buffers += _sums(sizes, passes, rows, columns)
    kept = None
    if keeps:
        kept = Buffer("kept logits", (of * sizes.vocab,), sizes.wide)
    elif expects:
        kept = Buffer("expectation", (of, sizes.depth), sizes.wide)
    return Plan(rows=rows, columns=columns, count=of, buffers=tuple(buffers), kept=kept)


def plan_backward(
    sizes: Sizes,
    mode: str,
    needs: tuple[bool, bool, bool],
    chunk: int = 0,
    *,
    models: int = 1,
    of: int | None = None,
    adds: bool = False,
    masked: bool = False,
    shared: bool = False,
) -> Plan:
    """Gradients of hidden states, weight and bias, as `needs` says, by `_linear.pull`.

    chunk, models, of: as of `plan_forward`. adds: the weight's gradient is in the statistics' type, and other rows' are
    in it. masked: a copy of the hidden states is needed, with those of some rows 0. shared: over parts of a vocabulary.
    """
    of = sizes.rows if of is None else of
    keeps, compacted = mode == "keep", of > sizes.rows
    of_hidden, of_weight, _ = needs
    narrow = sizes.dtype != sizes.wide
    apart = keeps or sizes.factors != sizes.wide
    passes = _Pass(
        element=(0 if keeps else models * sizes.wide.itemsize) + apart * sizes.factors.itemsize,
        moved=(1 if keeps else 2) * models * sizes.wide.itemsize + (1 + of_hidden + of_weight) * sizes.factors.itemsize,
        logits=0 if keeps else models,
        hidden=of_hidden,
        weight=of_weight,
        hidden_moves=8,
        weight_chunk=of_weight and narrow and not adds,
    )
    rows, columns = _blocks(sizes, passes, chunk, keeps)
    buffers = _pulled(sizes, passes, rows, columns, keeps=keeps, models=models, apart=apart)
    if of_hidden and (narrow or compacted):
        buffers.append(Buffer("hidden gradient", (sizes.rows, sizes.depth), sizes.wide))
    if masked and not (of_hidden and narrow):  # else the copy lies where the gradient will
        buffers.append(Buffer("masked hidden", (of, sizes.depth), sizes.dtype))
    if passes.weight_chunk and (sizes.rows > rows or not sizes.rounds):
        buffers.append(Buffer("weight gradient", (min(columns, sizes.vocab), sizes.depth), sizes.wide))
    if needs[2] and narrow:
        buffers.append(Buffer("bias gradient", (sizes.vocab,), sizes.wide))
    if compacted:
        buffers += _compacted(sizes, of, shared=shared, hidden_gradient=of_hidden)
    return Plan(rows=rows, columns=columns, count=of, buffers=tuple(buffers))


def plan_scaling(sizes: Sizes, entropy: bool, chunk: int = 0, *, of: int | None = None, shared: bool = False) -> Plan:
    """dX of a frozen head from E; with products only where the entropy has a gradient. See `plan_backward`."""
    of = sizes.rows if of is None else of
    narrow, compacted = sizes.dtype != sizes.wide, of > sizes.rows
    rows, columns, buffers = 0, 0, []
    if entropy:
        apart = sizes.factors != sizes.wide
        passes = _Pass(
            element=sizes.wide.itemsize + apart * sizes.factors.itemsize,
            moved=2 * sizes.wide.itemsize + 2 * sizes.factors.itemsize,
            logits=1,
            hidden=True,
            weight=False,
            hidden_moves=8,
        )
        rows, columns = _blocks(sizes, passes, chunk, False)
        buffers = _pulled(sizes, passes, rows, columns, keeps=False, models=1, apart=apart)
    at_once = min(sizes.rows, max(1, SCRATCH_BYTES // max(sizes.depth * sizes.wide.itemsize, 1)))
    buffers.append(Buffer("label rows", (at_once, sizes.depth), sizes.dtype))
    if narrow:
        buffers.append(Buffer("wide label rows", (at_once, sizes.depth), sizes.wide))
    if compacted or (narrow and (entropy or shared)):
        buffers.append(Buffer("hidden gradient", (sizes.rows, sizes.depth), sizes.wide))
    elif narrow:
        buffers.append(Buffer("rows", (at_once, sizes.depth), sizes.wide))
    if compacted:
        buffers.append(Buffer("compacted expectation", (sizes.rows, sizes.depth), sizes.wide))
        buffers += _compacted(sizes, of, shared=shared, hidden_gradient=True, hidden=entropy)
    return Plan(rows=rows, columns=columns, count=of, buffers=tuple(buffers))


def _pulled(
    sizes: Sizes, passes: _Pass, rows: int, columns: int, *, keeps: bool, models: int, apart: bool
) -> list[Buffer]:
    """What the loop of `_linear.pull` works in."""
    size = _size(sizes, rows, columns)
    buffers = [] if keeps else [Buffer("logits", (size,), sizes.wide)]
    if models == 2:
        buffers.append(Buffer("reference logits", (size,), sizes.wide))
    if apart:
        buffers.append(Buffer("factors", (size,), sizes.factors))
    return buffers + _sums(sizes, passes, rows, columns)


def _compacted(sizes: Sizes, of: int, *, shared: bool, hidden_gradient: bool, hidden: bool = True) -> list[Buffer]:
    """Copies of the rows that take part, and the way back."""
    buffers = [Buffer("compacted hidden", (sizes.rows, sizes.depth), sizes.dtype)] if hidden else []
    if hidden_gradient and shared:
        buffers.append(Buffer("spread gradient", (of, sizes.depth), sizes.wide))
    elif hidden_gradient and sizes.dtype != sizes.wide:
        buffers.append(Buffer("compacted gradient", (sizes.rows, sizes.depth), sizes.dtype))
    return buffers


class _Pass(NamedTuple):
    """What the time of a block depends on.

    element: bytes of buffers a logit. moved: bytes read and written a logit where they do not stay in the cache.
    logits, hidden, weight: products of N x V x D that make logits, and whether there are those for dX (or E) and dW.
    hidden_moves: bytes of the sums of dX (or E) read and written a chunk. weight_chunk: whether a chunk of dW is summed
    apart.
    """

    element: int
    moved: int
    logits: int
    hidden: bool
    weight: bool
    hidden_moves: int
    weight_chunk: bool = False


def _size(sizes: Sizes, rows: int, columns: int) -> int:
    return min(rows, sizes.rows) * min(columns, sizes.vocab)


def _sums(sizes: Sizes, passes: _Pass, rows: int, columns: int) -> list[Buffer]:
    """Where a product puts its result that cannot add it to another."""
    if sizes.adds:
        return []
    elements = 0
    if passes.hidden:
        elements = min(rows, sizes.rows) * sizes.depth
    if passes.weight:
        elements = max(elements, min(columns, sizes.vocab) * sizes.depth)
    return [Buffer("sums", (elements,), sizes.wide)] if elements else []


def _blocks(sizes: Sizes, passes: _Pass, chunk: int, keeps: bool) -> tuple[int, int]:
    """Rows and columns of a block."""
    if sizes.gpu:
        return _least_time(sizes, passes, chunk or (GPU_KEPT_CHUNK if keeps else 0), GPU_WORKSPACE_BYTES)
    columns = chunk or CHUNK
    return max(1, SCRATCH_BYTES // (min(columns, sizes.vocab) * sizes.wide.itemsize)), columns


@lru_cache(maxsize=1024)
def _least_time(sizes: Sizes, passes: _Pass, chunk: int, workspace: int) -> tuple[int, int]:
    pieces = min(GPU_CHUNKS, whole_pieces(sizes.vocab) // PIECE)
    candidates = [chunk] if chunk else [PIECE * n for n in range(1, pieces + 1)]
    choices = []
    for columns in candidates:
        most = _most_rows(sizes, passes, columns, workspace)
        in_cache = int(sizes.cache_bytes * CACHE_SHARE) // (max(passes.element, 1) * min(columns, sizes.vocab))
        choices += [(_even(sizes.rows, min(most, rows)), columns, most < TILE) for rows in (most, in_cache)]
    fitting = [choice[:2] for choice in choices if not choice[2]] or [choices[0][:2]]
    return min(fitting, key=lambda choice: _seconds(sizes, passes, *choice))


def _most_rows(sizes: Sizes, passes: _Pass, columns: int, workspace: int) -> int:
    """As many as fit."""
    width = min(columns, sizes.vocab)
    vectors = ROW_BYTES * sizes.rows + COLUMN_BYTES * columns
    room = max(workspace - vectors, workspace // 4)
    weight = width * sizes.depth * sizes.wide.itemsize
    room -= weight * (passes.weight_chunk + (passes.weight and not sizes.adds))
    a_row = passes.element * width
    if passes.hidden and not sizes.adds:
        a_row += sizes.depth * sizes.wide.itemsize
    return room // a_row if a_row else sizes.rows


def _even(count: int, most: int) -> int:
    """At most `most` rows a block, a multiple of TILE of them, in blocks of about the same size."""
    most = max(most // TILE, 1) * TILE
    blocks = max(1, -(-count // most))
    return max(1, -(-count // (blocks * TILE))) * TILE


def _seconds(sizes: Sizes, passes: _Pass, rows: int, columns: int) -> float:
    """Predicted: products at RATE, then what is read and written at BANDWIDTH, but no less than the host takes."""
    count, depth, vocab = sizes.rows, sizes.depth, sizes.vocab
    blocks, chunks = max(1, -(-count // rows)), -(-vocab // columns)
    products = passes.logits + passes.hidden + passes.weight
    moved = 0.0
    if passes.element * _size(sizes, rows, columns) > CACHE_SHARE * sizes.cache_bytes:
        moved += passes.moved * count * vocab
    moved += passes.hidden * passes.hidden_moves * count * depth * chunks
    moved += passes.weight * 8 * vocab * depth * blocks
    moved += products * sizes.dtype.itemsize * depth * (count * chunks + vocab * blocks)
    work = 2 * products * count * depth * vocab / RATE + moved / BANDWIDTH
    return max(work, blocks * chunks * HOST_SECONDS)
