"""Measures cases in this process: `python -m bench.gpu._worker CONFIG`, a line of JSON for the ceilings and each case.

A GPU that a rival has broken stays so in its process; the command starts another, which leaves that rival out.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import pkgutil
import sys
import traceback
from typing import Any

import torch

from bench._harness import Clock, Settings, measure_pass
from bench.gpu._cases import ALLOCATOR, GpuCase
from bench.gpu._clock import CudaClock, DeviceLost, measure_ceilings
from bench.gpu._passes import passes
from bench.linear_token_stats import ONE_PASS
from irlfast import ops


def measure_case(case: GpuCase, device: str, settings: Settings, clock: Clock) -> list[dict[str, Any]]:
    """The rows of one case."""
    torch.manual_seed(0)
    torch.compiler.reset()  # the same form at many sizes would run into the limit of recompilations
    about = {
        "line": case.line,
        "op": case.op,
        "work": case.work,
        "outputs": case.outputs,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    rows: list[dict[str, Any]] = []
    for work in passes(case, device):
        for row in measure_pass(work, ALLOCATOR, settings, clock):
            op = "linear_token_loss" if row["subject"].endswith(ONE_PASS) else case.op
            rows.append({**about, "impl": implementation(op, case, device), **row})
        del work  # the next pass needs the memory
    return rows


def implementation(op: str, case: GpuCase, device: str) -> str:
    """The name of what impl="auto" takes there: where that is the reference, the row shows no kernel of ours."""
    table = importlib.import_module(f"irlfast.ops.{op}").IMPLEMENTATIONS
    tensor = torch.empty(1, dtype=case.torch_dtype, device=device)
    return next(name for name, entry in table.items() if entry.unavailable(tensor) is None)


def leave_out(implementations: list[str]) -> None:
    """In this process, so that impl="auto" takes the next of each op's table."""
    for module in pkgutil.iter_modules(ops.__path__):
        table = getattr(importlib.import_module(f"irlfast.ops.{module.name}"), "IMPLEMENTATIONS", {})
        for name in implementations:
            table.pop(name, None)


def main() -> None:
    config = json.loads(sys.argv[1])
    settings = Settings(**{**config["settings"], "skip": tuple(config["settings"]["skip"])})
    # Whatever a library prints goes to stderr: stdout carries messages alone.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(**message: Any) -> None:
            print(json.dumps(message), file=out, flush=True)

        leave_out(config["without"])
        clock = CudaClock()
        if config["ceilings"]:
            say(ceilings=measure_ceilings(clock))
            torch.cuda.empty_cache()
        for fields in config["cases"]:
            case = GpuCase(**{**fields, "shape": tuple(fields["shape"]), "mallocs": tuple(fields["mallocs"])})
            try:
                say(rows=measure_case(case, config["device"], settings, clock))
            except DeviceLost as lost:
                say(lost=lost.name)
                return
            except Exception as problem:
                traceback.print_exc()
                say(failed=f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}")
            # An exception that names a frame holds its tensors until here.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
