"""Every configuration of the tuning table, compiled for its GPU without one: what the machine code holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_compile import TARGETS, Compiled, compile_only

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Of a narrow row of the table and of a wide one; multiples of 16, so that every row begins at 16 bytes.
NARROW, WIDE = 4096, 128256

ROWS = 4


def _arguments(dtype: torch.dtype, vocab: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(ROWS, vocab, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64)


def token_stats_forward(
    dtype: torch.dtype,
    vocab: int,
    block: Any,
    *,
    distribution: bool = True,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> None:
    from irlfast.ops._token_stats_triton import statistics_triton

    logits, labels = _arguments(dtype, vocab)
    statistics_triton(logits, labels, None, temperature, softcap, -100, distribution, with_state=True, block=block)


def token_stats_backward(
    dtype: torch.dtype, vocab: int, block: Any, *, inplace: bool = False, softcap: float = 0.0, temperature: float = 1.0
) -> None:
    from irlfast.ops._token_stats_triton import backward_triton

    logits, labels = _arguments(dtype, vocab)
    grads = [torch.zeros(ROWS)] * 3
    gradient = logits if inplace else None
    backward_triton(
        logits, labels, None, temperature, softcap, -100, torch.zeros(3, ROWS), *grads, gradient=gradient, block=block
    )


Launch = Callable[..., None]

# Function -> operation of the tuning table, rows of logits read and written.
PASSES: dict[Launch, tuple[str, int, int]] = {
    token_stats_forward: ("token_stats", 1, 0),
    token_stats_backward: ("token_stats", 1, 1),
}


def compile_pass(launch: Launch, target: str, dtype: torch.dtype, vocab: int, **options: Any) -> Compiled:
    """The one launch of a pass, in the configuration of the table."""
    from irlfast.kernels._tuning import config
    from irlfast.ops._triton import as_block

    entry = config(PASSES[launch][0], target, dtype.itemsize, vocab)
    with compile_only(target) as launches:
        launch(dtype, vocab, as_block(entry, dtype.itemsize), **options)
    (only,) = launches
    assert only.grid == (ROWS,)
    return only


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("vocab", [NARROW, WIDE])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", PASSES)
def test_nothing_is_spilled_and_accesses_are_wide(
    launch: Launch, target: str, dtype: torch.dtype, vocab: int, softcap: float
) -> None:
    compiled = compile_pass(launch, target, dtype, vocab, softcap=softcap)
    assert compiled.spills == 0
    assert compiled.registers <= 128
    assert compiled.shared <= 1024
    # What a loop reads and writes: a block, 16 bytes a thread and instruction, once.
    from irlfast.kernels._tuning import config

    operation, reads, writes = PASSES[launch]
    accesses = config(operation, target, dtype.itemsize, vocab).block * dtype.itemsize // (16 * compiled.threads)
    loops = compiled.loop_accesses
    print(launch.__name__, target, dtype, vocab, softcap, compiled.registers, compiled.shared, loops, accesses)
    assert Counter({("load", 16): reads * accesses, ("store", 16): writes * accesses}) - Counter() in loops
