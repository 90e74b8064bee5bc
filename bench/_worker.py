"""Measures cases of one op in this process: `python -m bench._worker CONFIG`, one JSON line of rows for each case.

A process cannot change its own allocator settings, so there is one for each of them.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
from typing import Any

import torch

from bench._case import Case
from bench._harness import Settings, measure_pass


def measure_case(case: Case, malloc: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows of one case."""
    torch.manual_seed(0)
    torch.compiler.reset()  # the same form at many sizes would run into the limit of recompilations
    about = {
        "line": case.line,
        "op": case.op,
        "work": case.work,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    module = importlib.import_module(f"bench.{case.op}")
    return [{**about, **row} for work in module.passes(case) for row in measure_pass(work, malloc, settings)]


def main() -> None:
    config = json.loads(sys.argv[1])
    torch.set_num_threads(config["threads"])
    settings = Settings(**{**config["settings"], "skip": tuple(config["settings"]["skip"])})
    # Whatever a library prints goes to stderr: stdout carries rows alone.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for fields in config["cases"]:
            case = Case(**{**fields, "shape": tuple(fields["shape"]), "mallocs": tuple(fields["mallocs"])})
            print(json.dumps(measure_case(case, config["malloc"], settings)), file=out, flush=True)


if __name__ == "__main__":
    main()
