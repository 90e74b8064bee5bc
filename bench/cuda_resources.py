"""What nvcc makes of csrc/cuda: `python -m bench.cuda_resources [--arch sm_90 ...] [--json FILE]`; needs no GPU.

Compiles each source for each architecture, every warning an error, and reads the machine code: registers, bytes of
stack, instructions that spill registers, shared memory, and how many loads and stores of 16 bytes a kernel has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"

# As CMakeLists.txt has them; tests/cuda/test_compiled.py compares.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra")


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings along."""
    nvcc = find_nvcc()
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        beside.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    for folder in [None, *beside]:
        found = shutil.which("cuobjdump", path=folder)
        if found is not None:
            return found
    return None


def sources() -> list[Path]:
    return [*sorted(CUDA.glob("*.cu")), CUDA / "common" / "device.cu"]


def compile_source(source: Path, architecture: str, folder: Path) -> Path:
    """The object; RuntimeError with what nvcc said where it fails or warns. "120-virtual" makes intermediate code."""
    number, _, kind = architecture.partition("-")
    code = f"compute_{number}" if kind == "virtual" else f"sm_{number}"
    result = folder / f"{source.stem}-{architecture}.o"
    command = [
        str(find_nvcc()), *FLAGS, "--Werror", "all-warnings", "-gencode", f"arch=compute_{number},code={code}",
        "-I", str(ROOT / "csrc" / "include"), "-I", str(CUDA), "-c", str(source), "-o", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    # Werror leaves out the warnings of the assembler.
    if done.returncode or "warning" in done.stdout:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return result


def read_object(path: Path) -> list[dict[str, Any]]:
    """A dictionary for each kernel of an object."""
    kernels: dict[str, dict[str, Any]] = {}
    usage = _cuobjdump("--dump-resource-usage", path)
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        kernels[name] = {
            "registers": used["REG"],
            "stack": used["STACK"],
            "local": used["LOCAL"],
            "shared": used["SHARED"],
            "loads_128": 0,
            "stores_128": 0,
            "spills": 0,
        }
    current = None
    for line in _cuobjdump("--dump-sass", path).splitlines():
        begins = re.search(r"Function : (\S+)", line)
        if begins:
            current = kernels[begins.group(1)]
        elif current is not None:
            current["loads_128"] += bool(re.search(r"\bLDG\.E\.(\w+\.)*128\b", line))
            current["stores_128"] += bool(re.search(r"\bSTG\.E\.(\w+\.)*128\b", line))
            current["spills"] += bool(re.search(r"\b(LDL|STL)\b", line))
    readable = _demangle(kernels)
    return [{"kernel": readable[name], **numbers} for name, numbers in kernels.items()]


def report(architectures: Iterable[str] = ARCHITECTURES) -> list[dict[str, Any]]:
    """All kernels for each architecture."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for source in sources():
                compiled = compile_source(source, architecture, Path(folder))
                if "virtual" not in architecture:
                    own = sorted(read_object(compiled), key=lambda row: row["kernel"])
                    rows += [{"architecture": f"sm_{architecture}", "source": source.name, **row} for row in own]
    return rows


def _cuobjdump(what: str, path: Path) -> str:
    command = [str(find_cuobjdump()), what, str(path)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _demangle(names: Iterable[str]) -> dict[str, str]:
    """name<arguments> of each kernel, without its namespaces and parameters."""
    names = list(names)
    shown = names
    if shutil.which("c++filt"):
        shown = subprocess.run(
            ["c++filt", *names], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()  # fmt: skip
    short = [re.sub(r"irlfast::|cuda::|\(anonymous namespace\)::|^void ", "", name) for name in shown]
    return {name: text.partition("(")[0] for name, text in zip(names, short, strict=True)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=[*ARCHITECTURES, "120-virtual"], metavar="90")
    parser.add_argument("--json", metavar="FILE", help="keep the rows there")
    arguments = parser.parse_args(argv)
    for tool, found in (("nvcc", find_nvcc()), ("cuobjdump", find_cuobjdump())):
        if found is None:
            print(f"bench.cuda_resources: {tool} is not on PATH, so nothing was compiled")
            return 2
    begin = time.monotonic()
    rows = report(arguments.arch)
    for row in rows:
        print(" ".join(f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in row.items()))
    print(f"{len(rows)} kernels, no warning, {time.monotonic() - begin:.0f} s")
    if arguments.json is not None:
        version = subprocess.run([str(find_nvcc()), "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
        about = {
            "command": "python -m bench.cuda_resources " + " ".join(argv),
            "nvcc": version.strip().splitlines()[-1],
            "flags": list(FLAGS),
            "architectures": list(arguments.arch),
            "kernels": rows,
        }
        Path(arguments.json).write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
