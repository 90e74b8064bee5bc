"""Every configuration of the tuning table, compiled for its GPU without one: what the machine code holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton_compile import TARGETS, Compiled, compile_only
from triton_mutation import assert_noticed

from irlfast import _native
from irlfast.ops import _token_kl_triton, _token_stats_triton
from irlfast.ops._triton import Block, as_block

if TYPE_CHECKING:
    from irlfast.kernels._tuning import Config

DTYPES = [torch.float32, torch.bfloat16]
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
    logits, labels = _arguments(dtype, vocab)
    _token_stats_triton.statistics_triton(
        logits, labels, None, temperature, softcap, -100, distribution, with_state=True, block=block
    )


def token_stats_backward(
    dtype: torch.dtype, vocab: int, block: Any, *, inplace: bool = False, softcap: float = 0.0, temperature: float = 1.0
) -> None:
    logits, labels = _arguments(dtype, vocab)
    grads = [torch.zeros(ROWS)] * 3
    gradient = logits if inplace else None
    _token_stats_triton.backward_triton(
        logits, labels, None, temperature, softcap, -100, torch.zeros(3, ROWS), *grads, gradient=gradient, block=block
    )


def token_kl_forward(
    dtype: torch.dtype, vocab: int, block: Any, *, kind: str = "reverse", softcap: float = 0.0, temperature: float = 1.0
) -> None:
    pair = [_arguments(dtype, vocab)[0] for _ in range(2)]
    _token_kl_triton.forward_triton(*pair, None, temperature, softcap, _native.DIVERGENCES[kind], 0.5, block=block)


def token_kl_backward(
    dtype: torch.dtype, vocab: int, block: Any, *, kind: str = "reverse", softcap: float = 0.0, temperature: float = 1.0
) -> None:
    pair = [_arguments(dtype, vocab)[0] for _ in range(2)]
    state, upstream = torch.zeros(6, ROWS, dtype=torch.float64), torch.zeros(ROWS)
    code = _native.DIVERGENCES[kind]
    _token_kl_triton.backward_triton(
        *pair, None, temperature, softcap, code, 0.5, state, upstream, True, True, block=block
    )


Launch = Callable[..., None]


class Pass(NamedTuple):
    """A launch, and what each logit's place in a row is read and written for."""

    launch: Launch
    operation: str  # in the tuning table
    reads: int
    writes: int
    options: dict[str, Any]


PASSES = {
    "token_stats forward": Pass(token_stats_forward, "token_stats", 1, 0, {}),
    "token_stats forward, softcap": Pass(token_stats_forward, "token_stats", 1, 0, {"softcap": 30.0}),
    "token_stats forward, log-prob alone": Pass(token_stats_forward, "token_stats", 1, 0, {"distribution": False}),
    "token_stats backward": Pass(token_stats_backward, "token_stats", 1, 1, {}),
    "token_stats backward, softcap": Pass(token_stats_backward, "token_stats", 1, 1, {"softcap": 30.0}),
    "token_stats backward, in place": Pass(token_stats_backward, "token_stats", 1, 1, {"inplace": True}),
    "token_kl forward": Pass(token_kl_forward, "token_kl", 2, 0, {}),
    "token_kl forward, js": Pass(token_kl_forward, "token_kl", 2, 0, {"kind": "js"}),
    "token_kl forward, js, softcap": Pass(token_kl_forward, "token_kl", 2, 0, {"kind": "js", "softcap": 30.0}),
    "token_kl backward": Pass(token_kl_backward, "token_kl", 2, 2, {}),
    "token_kl backward, js": Pass(token_kl_backward, "token_kl", 2, 2, {"kind": "js"}),
    "token_kl backward, js, softcap": Pass(token_kl_backward, "token_kl", 2, 2, {"kind": "js", "softcap": 30.0}),
}


KERNELS = ["token_stats forward", "token_stats backward", "token_kl forward", "token_kl backward"]


def compile_pass(name: str, target: str, dtype: torch.dtype, vocab: int, **options: Any) -> tuple[Compiled, Config]:
    """The one launch of a pass, in the configuration of the table."""
    from irlfast.kernels._tuning import config

    which = PASSES[name]
    entry = config(which.operation, target, dtype.itemsize, vocab)
    with compile_only(target) as launches:
        which.launch(dtype, vocab, as_block(entry, dtype.itemsize), **{**which.options, **options})
    (only,) = launches
    assert only.grid == (ROWS,)
    return only, entry


# Each pass in each entry of the table; what is more, in those of wide rows.
CASES = [(name, WIDE) for name in PASSES] + [(name, NARROW) for name in KERNELS]


@pytest.mark.parametrize(("name", "vocab"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_and_accesses_are_wide(name: str, target: str, dtype: torch.dtype, vocab: int) -> None:
    compiled, entry = compile_pass(name, target, dtype, vocab)
    print(compiled)  # pytest -rP shows registers and shared memory
    assert compiled.spills == 0
    assert compiled.registers <= 128
    assert compiled.shared <= 4096
    # The loop over whole blocks reads and writes each logit once, 16 bytes a thread and instruction.
    accesses = entry.block * dtype.itemsize // (16 * compiled.threads)
    expected = {("load", 16): PASSES[name].reads * accesses, ("store", 16): PASSES[name].writes * accesses}
    assert {access: count for access, count in expected.items() if count} in compiled.loop_accesses


def test_rows_that_begin_at_odd_addresses_are_read_in_narrow_pieces() -> None:
    """What the tuning table cannot help: no load of 16 bytes may begin between two multiples of 16."""
    with compile_only("sm_90") as launches:
        token_stats_forward(torch.bfloat16, 50257, Block(512, 8, 8, 1))
    (loop,) = launches[0].loop_accesses
    assert set(loop) == {("load", 2)}
    assert launches[0].spills == 0


def assert_one_kernel(name: str) -> None:
    """Temperature, softcap's value, the batch and its number of labels make no new kernel."""
    which = PASSES[name]
    with compile_only("sm_90") as launches:
        for temperature, softcap in ((1.0, 30.0), (0.7, 50), (1, 1), (16, 16.0)):
            options = {**which.options, "softcap": softcap}
            which.launch(torch.bfloat16, NARROW, Block(64, 8, 2, 1), **options, temperature=temperature)
    assert len({launch.key for launch in launches}) == 1


@pytest.mark.parametrize("name", KERNELS)
def test_temperature_and_softcap_make_no_new_kernel(name: str) -> None:
    assert_one_kernel(name)


@pytest.mark.parametrize("name", KERNELS)
def test_temperature_as_a_constant_is_noticed(name: str) -> None:
    old, new = "    temperature,\n    softcap,\n", "    temperature: tl.constexpr,\n    softcap,\n"
    assert_noticed(PASSES[name].operation, old, new, lambda: assert_one_kernel(name))


def test_the_number_of_rows_makes_no_new_kernel() -> None:
    block = Block(64, 8, 2, 1)
    with compile_only("sm_90") as launches:
        for rows in (1, 2, 16, 17, 70_000):
            logits = torch.zeros(1, 4096, dtype=torch.bfloat16).expand(rows, 4096)
            labels, grads = torch.zeros(rows, dtype=torch.int64), [torch.zeros(rows)] * 3
            gradient = torch.zeros(1, 4096, dtype=torch.bfloat16).expand(rows, 4096)  # not run, so not written
            options = (None, 1.0, 0.0, -100)
            state = _token_stats_triton.statistics_triton(logits, labels, *options, True, with_state=True, block=block)[
                3
            ]
            assert state is not None
            _token_stats_triton.backward_triton(logits, labels, *options, state, *grads, gradient=gradient, block=block)
    assert [launch.grid[0] for launch in launches[::2]] == [1, 2, 16, 17, 70_000]
    assert len({launch.key for launch in launches}) == 2


# Arguments that leave parts of a kernel out or change their types; what the loops above do not show.
VARIANTS: dict[str, dict[str, Any]] = {
    "log-prob alone": {"upstream": "logprob"},
    "entropy alone": {"upstream": "entropy"},
    "lse alone": {"upstream": "lse"},
    "temperature of each row": {"row_temperature": True},
    "several labels": {"labels": 3},
    "several labels, log-prob alone": {"labels": 64, "upstream": "logprob"},
    "one logit": {"vocab": 1},
    "two strides": {"shape": (2, 3)},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_variant_of_token_stats_compiles(target: str, variant: str) -> None:
    options = {"upstream": "", "row_temperature": False, "labels": 1, "vocab": 4096, "shape": (4,)}
    options.update(VARIANTS[variant])
    shape, vocab, count = options["shape"], options["vocab"], options["labels"]
    logits = torch.zeros(*shape, vocab, dtype=options.get("dtype", torch.bfloat16))
    if len(shape) == 2:
        logits = torch.zeros(shape[0], shape[1] + 1, vocab, dtype=logits.dtype)[:, :-1]
    label_shape = shape if count == 1 else (*shape, count)
    inputs = (
        logits,
        torch.zeros(label_shape, dtype=torch.int64),
        torch.ones(shape) if options["row_temperature"] else None,
        1.0,
        0.0,
        -100,
    )
    rows = torch.zeros(shape)
    upstream = {"logprob": torch.zeros(label_shape), "entropy": rows, "lse": rows}
    chosen = [value if options["upstream"] in ("", name) else None for name, value in upstream.items()]
    block = Block(64, 8, 2, 1)
    with compile_only(target) as launches:
        _token_stats_triton.statistics_triton(*inputs, True, with_state=False, block=block)
        state = torch.zeros(3, rows.numel())
        _token_stats_triton.backward_triton(*inputs, state, *chosen, block=block)
    assert [launch.spills for launch in launches] == [0, 0]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", _native.DIVERGENCES)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_variant_of_token_kl_compiles(target: str, kind: str, wanted: tuple[bool, bool]) -> None:
    pair = [torch.zeros(ROWS, 1 if kind == "js" else 4096, dtype=torch.float16) for _ in range(2)]
    options = (torch.ones(ROWS), 1.0, 30.0, _native.DIVERGENCES[kind], 0.3)
    block = Block(64, 8, 2, 1)
    with compile_only(target) as launches:
        _token_kl_triton.forward_triton(*pair, *options, block=block)
        state, upstream = torch.zeros(6, ROWS, dtype=torch.float64), torch.zeros(ROWS)
        _token_kl_triton.backward_triton(*pair, *options, state, upstream, *wanted, block=block)
    assert [launch.spills for launch in launches] == [0, 0]
