"""What every benchmark shares: contenders timed in turn, paired ratios, bandwidth, memory, both malloc settings."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import irlfast
from irlfast import _native

ROOT = Path(__file__).parents[1]

# glibc hands every large block back to the kernel, which then faults it in again page by page; "tuned" keeps them.
# Half of eager's time is those faults, so a fair comparison shows both.
MALLOC_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work.

    Attributes:
        run: does it once, and returns what must not be freed inside the timing.
        prepare: called before each run, outside the timing.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None


def tests_pass(op: str) -> bool:
    """Runs the op's tests; their output is shown where they fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "ops" / f"test_{op}.py")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def time_in_turn(contenders: Sequence[Contender], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Every round runs all of them, each round beginning with another."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(-warmup, rounds):
        start = turn % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            contender.prepare()
            begin = time.perf_counter()
            result = contender.run()
            elapsed = time.perf_counter() - begin
            del result
            if turn >= 0:
                times[contender.name].append(elapsed)
    return times


def paired_ratio(times: dict[str, list[float]], other: str, ours: str) -> float:
    """Median over rounds of other / ours within the round, which a machine that others use disturbs least."""
    return statistics.median(a / b for a, b in zip(times[other], times[ours], strict=True))


def copy_contender(elements: int) -> Contender:
    """Copies that many float32 between buffers that are already mapped: reads and writes 4 bytes each."""
    source, destination = torch.ones(elements), torch.zeros(elements)
    return Contender(name="copy", run=lambda: destination.copy_(source))


def peak_above_inputs(contender: Contender) -> int | None:
    """Bytes of resident memory that one run needs at most beyond what was there before; None outside Linux."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    contender.prepare()
    gc.collect()
    clear.write_text("5")  # resets the peak to what is resident now
    before = _status_bytes("VmRSS")
    result = contender.run()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_under_malloc_settings(module: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`module.measure(**config)` in a fresh process for each malloc setting: a process cannot change its own."""
    results = {}
    for name, settings in MALLOC_SETTINGS.items():
        code = f"import json, sys, {module} as m; json.dump(m.measure(**json.loads(sys.argv[1])), sys.stdout)"
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(config)],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the measurement with malloc setting {name!r} failed with status {done.returncode}")
        results[name] = json.loads(done.stdout)
    return results


def provenance(command: str) -> dict[str, Any]:
    """Where, when and with what a result was measured."""
    info = _native.build_info()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "irlfast": irlfast.__version__,
        "compiler": info["compiler"],
        "isa": info["isa"],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: str, result: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
