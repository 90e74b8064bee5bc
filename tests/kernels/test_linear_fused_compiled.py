"""The kernel of linear_token_stats with products inside, compiled for the GPUs of the tuning table without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from triton_compile import TARGETS, Compiled, compile_only
from triton_mutation import assert_noticed

from irlfast.ops._linear_fused_triton import forward_fused

ROWS, VOCAB = 256, 5000
DTYPES = {2: torch.bfloat16, 4: torch.float32}

# Bytes of shared memory that a program can have: CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA, LDS.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MULTIPROCESSOR = {"registers": 65536, "shared": 228 << 10}  # of sm_90; 1 KiB a program is the driver's

# Instructions that multiply matrices, or what there is for exact products of float32 on NVIDIA's GPUs.
PRODUCTS = {
    ("sm_80", 2): "HMMA",
    ("sm_90", 2): "HGMMA",
    ("sm_100", 2): "UTCHMMA",
    ("gfx942", 2): "v_mfma_f32_16x16x16_bf16",
    ("gfx942", 4): "v_mfma_f32_16x16x4_f32",
}
# Every entry but for the parts of the vocabulary, whose number is an argument.
ENTRIES = [
    ("sm_80", 2, 1024),
    ("sm_90", 2, 1024),
    ("sm_90", 2, 4096),
    ("sm_100", 2, 1024),
    ("gfx942", 2, 1024),
    *((target, 4, 1024) for target in TARGETS),
]


def compile_fused(
    target: str,
    element_bytes: int,
    depth: int,
    *,
    vocab: int = VOCAB,
    aligned: bool = True,
    everything: bool = False,
    temperature: float = 0.7,
    softcap: float = 30.0,
    rows: int = ROWS,
) -> list[Compiled]:
    """Both launches; everything: with a bias, a softcap and a temperature of each row."""
    from irlfast.kernels._tuning import product_config

    dtype = DTYPES[element_bytes]
    hidden, weight = torch.empty(rows, depth, dtype=dtype), torch.empty(vocab, depth, dtype=dtype)
    with compile_only(target) as launches:
        forward_fused(
            hidden,
            weight,
            torch.empty(vocab, dtype=dtype) if everything else None,
            torch.zeros(rows, dtype=torch.int64),
            torch.ones(rows) if everything else None,
            temperature,
            softcap if everything else 0.0,
            -100,
            config=product_config(target, element_bytes, depth, vocab, aligned),
        )
    assert [launch.kernel for launch in launches] == ["linear_fused_parts", "linear_fused_finish"]
    return launches


def instructions(compiled: Compiled, pattern: str) -> Counter[str]:
    return Counter(re.findall(pattern, compiled.machine_code))


@pytest.mark.parametrize(("target", "element_bytes", "depth"), ENTRIES)
def test_entries_multiply_with_matrix_units_and_spill_nothing(target: str, element_bytes: int, depth: int) -> None:
    for everything in (False, True):
        parts, finish = compile_fused(target, element_bytes, depth, everything=everything)
        print(parts)  # pytest -rP shows registers and shared memory
        assert (parts.spills, finish.spills) == (0, 0)
        assert parts.shared <= SHARED[target]
        if (target, element_bytes) in PRODUCTS:
            assert PRODUCTS[target, element_bytes] in parts.machine_code
        else:
            assert "FFMA" in parts.machine_code
            assert "HMMA" not in parts.machine_code  # whose operands would be rounded to TF32
        if target == "gfx942":
            copies = instructions(parts, r"global_load_dwordx4|buffer_load_dwordx4")
            assert sum(copies.values()) >= 8
        elif target == "sm_80":  # 16 bytes a thread, past the registers
            copies = instructions(parts, r"\bLDGSTS\S*")
            assert copies
            assert all(".128" in copy for copy in copies)
        else:  # whole tiles
            assert instructions(parts, r"\bUTMALDG\.2D\S*")
            assert not instructions(parts, r"\bLDGSTS\S*")


def test_two_programs_of_a_shallow_head_fit_a_multiprocessor() -> None:
    """What its entry for sm_90 is there for: one multiplies while the other adds up."""
    parts, _ = compile_fused("sm_90", 2, 1024)
    assert 2 * parts.registers * parts.threads <= MULTIPROCESSOR["registers"]
    assert 2 * (parts.shared + 1024) <= MULTIPROCESSOR["shared"]


@pytest.mark.parametrize(("target", "element_bytes"), [*((target, 2) for target in TARGETS), ("gfx942", 4)])
def test_the_fallback_compiles(target: str, element_bytes: int) -> None:
    """For rows that begin anywhere."""
    parts, finish = compile_fused(target, element_bytes, 777, aligned=False, everything=True)
    assert (parts.spills, finish.spills) == (0, 0)
    assert parts.shared <= 48 << 10  # what every GPU has


def assert_one_kernel() -> None:
    """Temperature, softcap's value, the number of rows and how many parts there are make no new kernel."""
    keys = set()
    for temperature, softcap, rows in ((1.0, 30.0, ROWS), (0.7, 5.0, 33), (0.5, 30.0, 77)):
        launches = compile_fused(
            "gfx942", 2, 777, aligned=False, everything=True, temperature=temperature, softcap=softcap, rows=rows
        )
        keys |= {(launch.kernel, launch.key) for launch in launches}
    assert len(keys) == 2


def test_temperature_softcap_and_rows_make_no_new_kernel() -> None:
    assert_one_kernel()


def test_the_number_of_parts_makes_no_new_kernel() -> None:
    """Of the first launch; the table's entries for narrow and wide vocabularies differ in nothing else."""
    from irlfast.kernels._tuning import NARROW

    (narrow, _), (wide, _) = (compile_fused("gfx942", 4, 64, vocab=vocab) for vocab in (NARROW, NARROW + 16))
    assert narrow.key == wide.key
    assert narrow.grid != wide.grid


BREAKS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "temperature as a constant": (
        "_linear_fused",
        "    temperature,\n    softcap,\n",
        "    temperature: tl.constexpr,\n    softcap,\n",
        assert_one_kernel,
    ),
    "a kernel for some numbers of rows": (
        "_linear_fused",
        'do_not_specialize=["rows", "splits", "ignore_index"]',
        'do_not_specialize=["splits", "ignore_index"]',
        assert_one_kernel,
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_is_noticed(what: str) -> None:
    assert_noticed(*BREAKS[what])


def test_every_target_has_its_entries() -> None:
    """For both sizes of an element, of a head's depth and of a vocabulary; a GPU unknown takes the fallback."""
    from irlfast.kernels._tuning import NARROW, SHALLOW, TARGETS, product_config, product_table

    table = product_table()
    for target in TARGETS:
        for element_bytes in (2, 4):
            for depth in (SHALLOW, SHALLOW + 1):
                for vocab in (NARROW, NARROW + 1):
                    entry = product_config(target, element_bytes, depth, vocab, True)
                    key = (target, element_bytes, depth <= SHALLOW, vocab <= NARROW)
                    assert entry == table[key]
                    assert entry.descriptors == (target in ("sm_90", "sm_100"))
                    assert entry.splits == (16 if vocab <= NARROW else 64)
    unknown = product_config("sm_120", 2, 1024, VOCAB, True)
    assert unknown == product_config("sm_90", 2, 1024, VOCAB, False)
    assert not unknown.descriptors
    distinct = {entry._replace(splits=0): key for key, entry in table.items()}
    assert len(distinct) == len({product_config(t, b, d, VOCAB, True) for t, b, d in ENTRIES})
