"""The kernels over segments, compiled without a GPU for each target: what the machine code holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_compile import TARGETS, Compiled, compile_only
from triton_mutation import assert_noticed

from irlfast import ops

# Sequences of a multiple of 16 tokens begin at 16 bytes; others do not.
ROWS, ALIGNED, ODD = 4, 64, 37


def _sequences(packed: bool, dtype: torch.dtype, width: int = ALIGNED) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, a mask and offsets."""
    shape = (ROWS * width,) if packed else (ROWS, width)
    offsets = torch.arange(0, ROWS * width + 1, width) if packed else None
    return torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=torch.bool), offsets


def sequence_forward(packed: bool, dtype: torch.dtype, width: int = ALIGNED) -> None:
    from irlfast.ops._sequence_triton import forward_triton

    forward_triton(*_sequences(packed, dtype, width), True)


def sequence_backward(packed: bool, dtype: torch.dtype, width: int = ALIGNED) -> None:
    from irlfast.ops._sequence_triton import backward_triton

    tokens, mask, offsets = _sequences(packed, dtype, width)
    backward_triton(torch.zeros(ROWS), mask, offsets, True, tokens.shape, dtype)


def gae(packed: bool, dtype: torch.dtype, width: int = ALIGNED, gamma: float = 0.9, lam: float = 0.95) -> None:
    from irlfast.ops._gae_triton import gae_triton

    tokens, mask, offsets = _sequences(packed, dtype, width)
    gae_triton(tokens, tokens, mask, offsets, torch.zeros(ROWS, dtype=dtype), gamma, lam)


def importance_forward(
    packed: bool, dtype: torch.dtype, width: int = ALIGNED, bounds: tuple[float, float] = (-1.0, 1.0)
) -> None:
    """Packed: with groups."""
    from irlfast.ops._importance_triton import forward_triton

    tokens = torch.zeros(ROWS * width, dtype=dtype)
    forward_triton(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int64) if packed else None, *bounds, 0.5)


def importance_backward(packed: bool, dtype: torch.dtype, width: int = ALIGNED, temper: float = 0.5) -> None:
    from irlfast.ops._importance_triton import backward_triton

    tokens, one = torch.zeros(ROWS * width, dtype=dtype), torch.zeros(1, dtype=dtype)
    groups = torch.zeros_like(tokens, dtype=torch.int64) if packed else None
    backward_triton(tokens, tokens, groups, -1.0, 1.0, temper, tokens, one, one)


def policy_terms(
    packed: bool,
    dtype: torch.dtype,
    width: int = ALIGNED,
    *,
    term: int = 1,
    sequence_correction: bool = False,
    coefficient: float = 0.3,
    dual_clip: float = 1.5,
) -> None:
    """With every input and every option that the term takes."""
    from irlfast.ops._policy_terms_triton import sweep_triton

    tokens, mask, offsets = _sequences(packed, dtype, width)
    keep = torch.ones(ROWS, dtype=torch.bool)
    inputs = (tokens, tokens, mask, offsets, tokens, tokens, tokens, tokens, keep, None)
    numbers = (0.0, True, term, 0.2, 0.3, dual_clip if term in (1, 2) else 0.0, coefficient, 2, coefficient)
    sweep_triton(*inputs, *numbers, 1.3, 0.6, 1.8, sequence_correction, 1, True)


Launch = Callable[..., None]


def compile_launches(launch: Launch, target: str, *arguments: Any, **options: Any) -> list[Compiled]:
    with compile_only(target) as launches:
        launch(*arguments, **options)
    return launches


LAUNCHES: dict[str, Launch] = {
    "sequence forward": sequence_forward,
    "sequence backward": sequence_backward,
    "gae": gae,
    "importance forward": importance_forward,
    "importance backward": importance_backward,
    "reinforce": partial(policy_terms, term=0),
    "ppo": policy_terms,
    "gspo": partial(policy_terms, term=2, sequence_correction=True),
    "cispo": partial(policy_terms, term=3),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_nothing_is_spilled(name: str, target: str, dtype: torch.dtype, packed: bool) -> None:
    if dtype == torch.bfloat16 and not name.startswith("sequence"):
        pytest.skip("brought to float32 before the kernel")
    if name in ("reinforce", "cispo") and (packed or dtype == torch.float64):
        pytest.skip("less of everything than ppo has")
    launches = compile_launches(LAUNCHES[name], target, packed, dtype)
    assert len(launches) == (2 if name in ("reinforce", "ppo", "gspo", "cispo") else 1)
    for compiled in launches:
        print(compiled.kernel, target, dtype, packed, compiled.registers, compiled.spills, compiled.shared)
        # Float64 is for checks, not for speed: of its sweep, the largest kernel, a few registers may go elsewhere.
        assert compiled.spills <= (16 if dtype == torch.float64 and compiled.kernel == "policy_terms_sweep" else 0)
        assert compiled.shared <= 8192


# Loop by loop: arrays read and written in blocks, of the tokens' type; the mask is read in each.
TRAFFIC = {
    "sequence forward": [(1, 0)],
    "sequence backward": [(0, 0), (0, 1)],
    "reinforce": [(0, 0), (6, 2)],
    "ppo": [(0, 0), (6, 2)],
    "gspo": [(0, 0), (2, 0), (2, 0), (6, 2), (1, 1)],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRAFFIC)
def test_every_array_is_read_once_and_wide(name: str, target: str) -> None:
    """16 bytes a thread in float32, 8 where AMD's wavefronts of 64 share the block."""
    sweep = compile_launches(LAUNCHES[name], target, False, torch.float32)[0]
    wide = 8 if target.startswith("gfx") else 16
    loops = [Counter({k: n for k, n in loop.items() if k[1] == wide}) for loop in sweep.loop_accesses]
    print(name, target, sweep.loop_accesses)
    for reads, writes in TRAFFIC[name]:
        # The compiler may have written a loop out four times.
        assert any(
            Counter({("load", wide): n * reads, ("store", wide): n * writes}) - Counter() in loops for n in (1, 4)
        )


@pytest.mark.parametrize("name", ["sequence forward", "gae", "importance backward", "ppo"])
def test_lengths_and_options_are_not_compiled_in(name: str) -> None:
    """1 and 0 too, which Triton likes to."""
    others: dict[str, dict[str, Any]] = {
        "gae": {"gamma": 0.0, "lam": 1.0},
        "importance backward": {"temper": 0.0},
        "ppo": {"coefficient": 1.0, "dual_clip": 3.0},
    }
    launch = LAUNCHES[name]
    for widths in ((ALIGNED, 2 * ALIGNED), (ODD, 1)):
        first, second = (
            compile_launches(launch, "sm_90", False, torch.float32, width, **options)
            for width, options in zip(widths, ({}, others.get(name, {})), strict=True)
        )
        assert [x.key for x in first] == [x.key for x in second]


def test_traced_for_a_gpu_that_is_not_there() -> None:
    """impl="auto" takes the registered ops, whose shapes follow without data."""
    with FakeTensorMode():
        logprobs, rewards = torch.empty(4, 8, device="cuda"), torch.empty(4, device="cuda")
        offsets = torch.empty(5, dtype=torch.int32, device="cuda")
        loss, metrics = ops.policy_terms(logprobs, rewards, term="ppo", old_logprobs=logprobs)
        sums = ops.sequence_logprobs(logprobs.reshape(-1), cu_seqlens=offsets)
        weights, log_normalizer, ess = ops.importance_weights(logprobs.reshape(-1), logprobs.reshape(-1))
    outputs = (loss, metrics, sums, weights, log_normalizer, ess)
    assert {x.device.type for x in outputs} == {"cuda"}
    assert [tuple(x.shape) for x in outputs] == [(), (18,), (4,), (32,), (1,), (1,)]


@pytest.mark.parametrize("op", ["policy_terms", "sequence_logprobs", "importance_weights"])
@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_every_op_has_a_kernel_for_gpus(op: str, suffix: str) -> None:
    name = f"irlfast::{op}{suffix}"
    assert any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CUDA", "CompositeExplicitAutograd")
    )


def test_breaks_of_what_is_compiled_are_noticed() -> None:
    assert_noticed(
        "sequence",
        '@triton.jit(do_not_specialize=["width", "total"])\ndef sequence_forward',
        "@triton.jit\ndef sequence_forward",
        partial(test_lengths_and_options_are_not_compiled_in, "sequence forward"),
    )
    wide = partial(test_every_array_is_read_once_and_wide, "ppo", "sm_90")
    assert_noticed("_segments", "begin = tl.multiple_of(begin, 16)", "begin = begin", wide)
    assert_noticed(
        "_segments",
        "tl.load(data + index, mask=inside, other=0.0), 0.0)",
        "tl.load(data + index, mask=counts, other=0.0), 0.0)",
        wide,
    )
