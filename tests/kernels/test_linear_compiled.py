"""The kernels over chunks of logits, compiled for the GPUs of the tuning table without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_cases import PIECE
from torch import Tensor
from triton_compile import TARGETS, Compiled, compile_only
from triton_mutation import assert_noticed

from irlfast.ops._linear import Rows, Upstream
from irlfast.ops._linear_pair_triton import TritonPairEpilogue
from irlfast.ops._linear_triton import TritonEpilogue
from irlfast.ops._triton import Block, as_block

VOCAB = 128256
ROWS = 4
HALF = torch.bfloat16


def of_rows(softcap: float = 0.0, temperature: float = 1.0, row_temperature: Tensor | None = None) -> Rows:
    return Rows(torch.zeros(ROWS, dtype=torch.int64), row_temperature, temperature, softcap)


def launch_all(
    block: Block, pair_block: Block, rows: Rows, *, width: int = PIECE, first_column: int = 0, out: torch.dtype = HALF
) -> None:
    """Each of the five kernels once, in the order of KERNELS."""
    alone, pair = TritonEpilogue(VOCAB, -100, block), TritonPairEpilogue(VOCAB, -100, pair_block)
    logits, ref_logits = torch.zeros(ROWS, width), torch.zeros(ROWS, width)
    running, gradient = torch.zeros(9, ROWS, dtype=torch.float64), torch.zeros(ROWS, width, dtype=out)
    upstream = Upstream(*[torch.zeros(ROWS)] * 5)
    alone.merge(logits, first_column, rows, running, weighted=True)
    alone.exponentials(logits, first_column, rows, running[0], gradient)
    alone.differentiate(logits, first_column, rows, torch.zeros(4, ROWS), upstream, gradient, row_numbers=None)
    pair.merge(logits, ref_logits, first_column, rows, running)
    pair.differentiate(logits, ref_logits, first_column, rows, running, upstream, gradient)


# Name -> what each logit's place is read and written for.
KERNELS = {
    "linear_token_stats_merge": (1, 0),
    "linear_token_stats_exponentials": (1, 1),
    "linear_token_stats_differentiate": (1, 1),
    "linear_policy_ref_stats_merge": (2, 0),
    "linear_policy_ref_stats_differentiate": (2, 1),
}


def compile_all(target: str, rows: Rows, **options: object) -> list[Compiled]:
    from irlfast.kernels._tuning import config

    entries = [config(kernel, target, 4, PIECE) for kernel in ("linear_token_stats", "linear_policy_ref_stats")]
    with compile_only(target) as launches:
        launch_all(*(as_block(entry, 4) for entry in entries), rows, **options)  # type: ignore[arg-type]
    assert [launch.kernel for launch in launches] == list(KERNELS)
    return launches


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_and_accesses_are_wide(target: str) -> None:
    for compiled in compile_all(target, of_rows()):
        print(compiled)  # pytest -rP shows registers and shared memory
        assert compiled.spills == 0
        assert compiled.registers <= 128
        assert compiled.shared <= 4096
        # The loop over whole blocks of 2048 float32 touches each logit once, 16 bytes a thread and instruction; what is
        # written is half as wide.
        reads, writes = KERNELS[compiled.kernel]
        accesses = PIECE * 4 // (16 * compiled.threads)
        expected = {("load", 16): reads * accesses, ("store", 16): writes * accesses // 2}
        assert {access: count for access, count in expected.items() if count} in compiled.loop_accesses


VARIANTS = {
    "softcap": lambda target: compile_all(target, of_rows(softcap=30.0)),
    "a temperature of each row, a ragged chunk, float32 gradients": lambda target: compile_all(
        target, of_rows(row_temperature=torch.ones(ROWS)), width=77, out=torch.float32
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_variants_compile(target: str, variant: str) -> None:
    assert [compiled.spills for compiled in VARIANTS[variant](target)] == [0] * 5


@pytest.mark.parametrize("numbered", [False, True])
def test_log_prob_alone_and_numbered_rows_compile(numbered: bool) -> None:
    """What linear_token_loss launches where entropy and lse are not in its loss."""
    epilogue = TritonEpilogue(VOCAB, -100, Block(512, 4, 8, 1))
    out = torch.zeros(ROWS, PIECE, dtype=HALF)
    numbers = torch.arange(ROWS) if numbered else None
    with compile_only("sm_90") as launches:
        epilogue.differentiate(
            torch.zeros(ROWS, PIECE),
            0,
            of_rows(),
            torch.zeros(4, ROWS),
            Upstream(torch.zeros(ROWS), None, None),
            out,
            row_numbers=numbers,
        )
    assert launches[0].spills == 0


def assert_one_kernel() -> None:
    """A temperature, the value of a softcap and a chunk's place make no new kernel."""
    block = Block(512, 4, 8, 1)
    with compile_only("sm_90") as launches:
        for softcap, temperature, first_column in ((30.0, 1.0, 0), (5.0, 0.7, PIECE), (30.0, 1.0, 62 * PIECE)):
            launch_all(block, block, of_rows(softcap, temperature), first_column=first_column)
    assert len({launch.key for launch in launches}) == len(KERNELS)


def test_temperature_softcap_and_chunk_make_no_new_kernel() -> None:
    assert_one_kernel()


BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "temperature as a constant": (
        "linear_policy_ref_stats",
        "    temperature,\n    softcap,\n",
        "    temperature: tl.constexpr,\n    softcap,\n",
        assert_one_kernel,
    ),
    "a softcap's value as a constant": (
        "linear_token_stats",
        "    softcap,\n    SOFTCAP: tl.constexpr,\n",
        "    softcap: tl.constexpr,\n    SOFTCAP: tl.constexpr,\n",
        assert_one_kernel,
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str) -> None:
    assert_noticed(*BREAKS[what])


def test_every_target_has_its_own_entries() -> None:
    """Blocks that divide a piece, of whole loads of 16 bytes for each thread."""
    from irlfast.kernels._tuning import NARROW, TARGETS, config, table

    for kernel in ("linear_token_stats", "linear_policy_ref_stats"):
        for target in TARGETS:
            for vocab in (NARROW, NARROW + 1):
                entry = config(kernel, target, 4, vocab)
                assert entry == table()[kernel, target, 4, vocab <= NARROW]
                assert PIECE % entry.block == 0
                assert entry.block * 4 % (16 * entry.num_warps * (64 if target.startswith("gfx") else 32)) == 0
        assert PIECE % config(kernel, "", 4, NARROW).block == 0
