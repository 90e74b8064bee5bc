"""Compiles Triton kernels for GPUs that are not there, and reads the result.

    with compile_only("sm_90") as launches:
        statistics_triton(logits, labels, ...)          # any function that launches kernels, on tensors of the CPU
    assert launches[0].spills == 0

Each launch is compiled as the real launcher would for the same arguments (types, divisibility, options), and not run:
outputs keep what was in their memory. The launches are there in order, each with what came of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

# Name -> backend, architecture and threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

_NVIDIA_ACCESS = re.compile(r"\b(LD|ST)G\.E((?:\.[A-Z0-9_]+)*)")
_NVIDIA_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "short": 2,
    "ushort": 2,
    "ubyte": 1,
    "sshort": 2,
    "byte": 1,
}


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled for a target.

    Attributes:
        kernel: the function's name.
        target: a name in TARGETS.
        grid: the launch's.
        threads: of a program.
        registers: of a thread (AMD: vector registers).
        spills: bytes (NVIDIA) or registers (AMD) that do not fit and go to memory.
        shared: bytes of shared memory of a program.
        key: of the compiled kernel: two launches with equal keys run the same machine code.
    """

    kernel: str
    target: str
    grid: tuple[int, ...]
    threads: int
    registers: int
    spills: int
    shared: int
    key: str
    _asm: dict[str, Any] = field(repr=False)

    @cached_property
    def machine_code(self) -> str:
        """SASS, or AMD's assembly."""
        return _sass(self._asm["cubin"]) if "cubin" in self._asm else str(self._asm["amdgcn"])

    @cached_property
    def accesses(self) -> Counter[tuple[str, int]]:
        """("load" | "store", bytes a thread) -> how many such instructions on global memory."""
        return Counter(access for _, access in self._accesses())

    @cached_property
    def loop_accesses(self) -> list[Counter[tuple[str, int]]]:
        """The same for each innermost loop that touches global memory, in order."""
        loops = self._loops()
        innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        inside = [Counter(x for at, x in self._accesses() if begin <= at <= end) for begin, end in sorted(innermost)]
        return [counter for counter in inside if counter]

    def _lines(self) -> list[str]:
        return self.machine_code.splitlines()

    def _accesses(self) -> Iterator[tuple[int, tuple[str, int]]]:
        for at, line in enumerate(self._lines()):
            if nvidia := _NVIDIA_ACCESS.search(line):
                sizes = [_NVIDIA_BYTES[part] for part in nvidia[2].split(".") if part in _NVIDIA_BYTES]
                yield at, ({"LD": "load", "ST": "store"}[nvidia[1]], sizes[0] if sizes else 4)
            elif amd := _AMD_ACCESS.match(line):
                yield at, (amd[1], _AMD_BYTES[amd[2].partition("_")[0]])

    def _loops(self) -> set[tuple[int, int]]:
        """First and last line of each loop: what a backward branch goes over."""
        labels: dict[str, int] = {}
        loops = set()
        for at, line in enumerate(self._lines()):
            if label := re.match(r"\s*/\*([0-9a-f]{4,})\*/|(\.L\w+):", line):
                labels[str(int(label[1], 16)) if label[1] else label[2]] = at
            branch = re.search(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)|\bs_c?branch\w*\s+(\.L\w+)", line)
            if branch:
                goal = labels.get(str(int(branch[1], 16)) if branch[1] else branch[2])
                if goal is not None and goal < at:
                    loops.add((goal, at))
        return loops


@contextmanager
def compile_only(target: str) -> Iterator[list[Compiled]]:
    """Within it, launches of Triton kernels are compiled for the target and recorded, and not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Compiled] = []
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(_read(compiled, target, tuple(grid)))
        return compiled

    before = driver._active
    driver.set_active(_Driver(GPUTarget(*TARGETS[target])))
    JITFunction.run = compile_launch
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(before)


class _Driver:
    """Stands for a GPU of the target, to be asked and not to be run on."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return f"no {self._target}"  # the key that kernels are kept under, in place of a device's number

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _read(compiled: Any, target: str, grid: tuple[int, ...]) -> Compiled:
    asm = compiled.asm
    if "cubin" in asm:
        usage = _cuobjdump("--dump-resource-usage", asm["cubin"])
        registers = int(re.findall(r"REG:(\d+)", usage)[0])
        # What is spilled lies in local memory, as do arrays that no register can hold; the kernels have neither.
        spills = max(int(x) for x in re.findall(r"(?:LOCAL|STACK):(\d+)", usage))
    else:
        text = asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        spills = sum(int(x) for x in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    return Compiled(
        compiled.name, target, grid, threads, registers, spills, compiled.metadata.shared, compiled.hash, asm
    )


def _sass(cubin: bytes) -> str:
    return _cuobjdump("--dump-sass", cubin)


def _cuobjdump(option: str, cubin: bytes) -> str:
    """Output of the tool in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
