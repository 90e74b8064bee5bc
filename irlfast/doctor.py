"""``irlfast doctor``: what was built, what this machine offers, what is missing, and whether the kernels are right.

Needs torch and numpy alone, and works where the native module is missing: saying so is its purpose.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

import irlfast

# Distribution -> how to get it.
OPTIONAL_PACKAGES = {
    "triton": 'pip install "irlfast[gpu]"',
    "transformers": 'pip install "irlfast[train]"',
    "datasets": 'pip install "irlfast[train]"',
    "safetensors": 'pip install "irlfast[train]"',
    "tyro": 'pip install "irlfast[train]"',
    "rich": 'pip install "irlfast[train]"',
    "matplotlib": 'pip install "irlfast[train]"',
    "scipy": 'pip install "irlfast[train]"',
    "sglang": "pip install sglang",
}

REBUILD = (
    "run `pip install .` (or `pip install -e .`) in the source folder; Python started in that folder sees its "
    "sources, where nothing is compiled, unless the install was editable"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report.

    Attributes:
        section: heading it stands under.
        name: what was looked at.
        value: what was found, and where something is missing, what to do.
        status: "ok"; "absent", something optional is not there; "failed", irlfast does not work here.
    """

    section: str
    name: str
    value: str
    status: Literal["ok", "absent", "failed"] = "ok"


def collect() -> list[Check]:
    """Everything `irlfast doctor` shows, in order."""
    native, problem = _load_native()
    checks = [*_versions(), *_native_build(native, problem), *_devices(), *_packages()]
    if native is not None:
        checks += [*_implementations(), *_self_checks(native)]
    return checks


def main() -> int:
    """Print the report; returns 1 where irlfast does not work here, else 0."""
    checks = collect()
    print(format_report(checks))
    failed = [check for check in checks if check.status == "failed"]
    print(f"\n{len(failed)} problem(s): irlfast does not work here as it should" if failed else "\nirlfast works here")
    return 1 if failed else 0


def format_report(checks: list[Check]) -> str:
    """The checks as an aligned table, a heading above each section."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    section = None
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {check.status:<6}  {check.name:<{width}}  {check.value}")
    return "\n".join(lines)


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("irlfast._native"), ""
    except ImportError as error:
        return None, str(error)


def _versions() -> Iterator[Check]:
    yield Check(section="versions", name="irlfast", value=f"{irlfast.__version__}, {irlfast.__file__}")
    yield Check(section="versions", name="python", value=f"{platform.python_version()}, {platform.platform()}")
    yield Check(section="versions", name="torch", value=f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Check(section="versions", name="numpy", value=importlib.metadata.version("numpy"))


def _native_build(native: ModuleType | None, problem: str) -> Iterator[Check]:
    section = "native module"
    if native is None:
        yield Check(section=section, name="irlfast._native", value=f"{problem}: {REBUILD}", status="failed")
        return
    info = native.build_info()
    yield Check(section=section, name="irlfast._native", value=str(native.__file__))
    if info["version"] == irlfast.__version__:
        yield Check(section=section, name="version", value=info["version"])
    else:
        value = f"{info['version']} was compiled, the Python files are {irlfast.__version__}: {REBUILD}"
        yield Check(section=section, name="version", value=value, status="failed")
    yield Check(section=section, name="compiler", value=info["compiler"])
    isas = f"{info['isa']} (built: {', '.join(info['isas_built'])}; usable here: {', '.join(info['isas_usable'])})"
    yield Check(section=section, name="instruction set", value=isas)
    if info["bf16_product"]:
        yield Check(section=section, name="bfloat16 products", value="native (AVX512_BF16)")
    else:
        value = "by float32 copies: neither compiler nor processor may lack AVX512_BF16 for the native ones"
        yield Check(section=section, name="bfloat16 products", value=value, status="absent")
    yield Check(section=section, name="CUDA kernels", **_cuda_build(info))
    yield Check(section=section, name="sanitizers", value=", ".join(info["sanitizers"]) or "none")


def _cuda_build(info: dict[str, Any]) -> dict[str, Any]:
    if info["cuda_built"]:
        return {"value": f"built by {info['cuda_compiler']} for {', '.join(info['cuda_architectures'])}"}
    if info.get("cuda_emulated"):
        value = "emulated on the CPU, thread by thread, for tests: IRLFAST_CUDA=EMULATE"
    else:
        value = "not built: no nvcc was found when irlfast was built, or it was built with IRLFAST_CUDA=OFF"
    return {"value": value, "status": "absent"}


def _devices() -> Iterator[Check]:
    section = "devices"
    yield Check(section=section, name="cpu", value=f"{platform.machine()}, {os.cpu_count()} cores")
    platforms = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    built_for = [f"{name} {version}" for name, version in platforms if version is not None]
    if not built_for:
        yield Check(section=section, name="gpu", value="this torch is a CPU build", status="absent")
    elif not torch.cuda.is_available():
        value = f"torch is built for {', '.join(built_for)} and sees no device"
        yield Check(section=section, name="gpu", value=value, status="absent")
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            value = f"{properties.name}, {memory:.0f} GiB, {', '.join(built_for)}"
            yield Check(section=section, name=f"cuda:{index}", value=value)


def _packages() -> Iterator[Check]:
    installed = {name for distribution in importlib.metadata.distributions() if (name := distribution.name)}
    for name, remedy in OPTIONAL_PACKAGES.items():
        if name in installed:
            yield Check(section="optional packages", name=name, value=importlib.metadata.version(name))
        else:
            yield Check(section="optional packages", name=name, value=f"not installed: {remedy}", status="absent")


def _implementations() -> Iterator[Check]:
    """For each op and device, what impl= may be, the one that "auto" takes first, and why others are not there."""
    from irlfast import ops

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    functions = {name: getattr(ops, name) for name in ops.__all__ if not name.endswith("_reference")}
    for op, function in functions.items():
        if isinstance(function, type):
            continue
        table = getattr(importlib.import_module(function.__module__), "IMPLEMENTATIONS", None)
        if table is None:
            yield Check(section="ops", name=op, value="plain torch, on any device")
            continue
        for device in devices:
            logits = torch.empty(1, 1, device=device)
            reasons = {name: implementation.unavailable(logits) for name, implementation in table.items()}
            usable = [name for name, reason in reasons.items() if reason is None]
            missing = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
            value = "; ".join([f"{', '.join(usable)} (auto takes {usable[0]})", *missing])
            yield Check(section="ops", name=f"{op} on {device}", value=value)


def _self_checks(native: ModuleType) -> Iterator[Check]:
    """token_stats, compiled for each instruction set that runs here, against the float64 reference."""
    from irlfast.ops.token_stats import as_op, backward_cpu, statistics_cpu, token_stats_reference

    generator = torch.Generator().manual_seed(0)
    rows, vocab = 5, 4093  # neither a multiple of any vector's length
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    upstream = torch.randn(3, rows, generator=generator)
    wide = logits.double().requires_grad_()
    reference = torch.stack(token_stats_reference(wide, labels))
    (exact_gradient,) = torch.autograd.grad(reference, wide, upstream.double())
    exact = reference.detach()
    for isa in native.build_info()["isas_usable"]:
        *statistics, state = as_op(statistics_cpu)(logits, labels, None, 1.0, 0.0, -100, True, isa=isa)
        gradient = backward_cpu(logits, labels, None, 1.0, 0.0, -100, state, *upstream, isa=isa)
        error = float((torch.stack(statistics) - exact).abs().max())
        gradient_error = float((gradient - exact_gradient).abs().max())
        right = error <= SELF_CHECK_TOLERANCE and gradient_error <= SELF_CHECK_TOLERANCE
        yield Check(
            section="self-check",
            name=f"token_stats ({isa})",
            value=f"largest error against float64: {error:.1e}, gradient {gradient_error:.1e}"
            + ("" if right else f", expected at most {SELF_CHECK_TOLERANCE:.0e}: {REBUILD}"),
            status="ok" if right else "failed",
        )


# The statistics are sums of 4093 float32 numbers and about 10 in size; the tests hold them to closer bounds.
SELF_CHECK_TOLERANCE = 1e-5
