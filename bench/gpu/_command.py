"""The command behind `python -m bench gpu`: hands cases to a process, keeps its rows, and stops when time is over."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import _results
from bench._harness import Settings
from bench._report import print_rows, print_summary
from bench._run import ROOT, comma_separated
from bench.gpu._cases import CASES, GpuCase
from bench.gpu._model import model_table
from irlfast.ops._linear_plan import Sizes, plan_backward, plan_forward

NO_GPU = "bench gpu: torch sees no GPU here, so nothing was measured and nothing written"
# Of one case, inputs and compilers included; what takes longer hangs.
CASE_SECONDS = 150.0

Note = dict[str, str]  # a case that was not measured, and why


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="Measures every op on a GPU beside eager PyTorch, torch.compile, peers and the GPU's own copy "
        "bandwidth and product rate. docs/performance.md explains it.",
    )
    result.add_argument("--json", metavar="FILE", help="keep the results there, after each case")
    result.add_argument("--plot", metavar="FILE", help="draw the results there, as PNG")
    result.add_argument(
        "--budget-minutes", type=float, default=7.5, help="stop then; what was not reached is named; default 7.5"
    )
    result.add_argument("--budget", type=float, default=1.0, help="seconds of timed runs for a contender; default 1")
    result.add_argument("--lines", type=comma_separated(*"ABCDE"), metavar="A,B", help="only these: logits A B C, "
                        "hidden states D, sequences E")  # fmt: skip
    result.add_argument(
        "--skip", type=comma_separated("eager", "compile", "peer"), default=(), metavar="FAMILY,...",
        help="leave out eager, compile or peer contenders",
    )  # fmt: skip
    result.add_argument(
        "--without", type=comma_separated("cuda", "triton"), default=(), metavar="IMPL,...",
        help="leave out an implementation: impl=\"auto\" takes the next one",
    )  # fmt: skip
    result.add_argument("--scale", type=float, default=1.0, help="multiplies the rows, for a smaller GPU")
    result.add_argument("--plan", metavar="ROWSxDEPTHxVOCAB", help="print what linear_token_stats allocates for a head "
                        "in bfloat16 that is trained; needs no GPU")  # fmt: skip
    result.add_argument("--predict", action="store_true", help="print the cost model's table instead; needs no GPU")
    return result


def main(argv: list[str]) -> int:
    options = parser()
    arguments = options.parse_args(argv)
    for name in ("budget_minutes", "budget", "scale"):
        if getattr(arguments, name) <= 0:
            options.error(f"--{name.replace('_', '-')} is {getattr(arguments, name):g}; expected a positive number")
    if arguments.predict:
        print(model_table([]))
        return 0
    if arguments.plan:
        sizes = arguments.plan.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
            options.error(f"--plan is {arguments.plan!r}; expected three numbers, as in 32768x4096x151936")
        print(plan_of(*map(int, sizes)))
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    begin = time.monotonic()
    cases = [case for case in CASES if arguments.lines is None or case.line in arguments.lines]
    cases = [case.scaled(arguments.scale) for case in cases]  # type: ignore[misc]
    origin = {**_results.provenance(shlex.join(["python", "-m", "bench", "gpu", *argv])), **gpu_provenance()}
    print(f"{origin['gpu']}, torch {origin['torch']}, {len(cases)} cases in {arguments.budget_minutes:g} minutes")
    settings = Settings(budget=arguments.budget, memory=True, skip=tuple(arguments.skip))
    session = Session(origin, arguments.json)
    session.measure(cases, settings, begin + 60 * arguments.budget_minutes, without=arguments.without)
    print_summary(session.rows)
    print(f"\n{len(session.rows)} rows in {(time.monotonic() - begin) / 60:.1f} minutes")
    for note in session.notes:
        print(f"not measured: {note['case']}: {note['reason']}")
    if arguments.plot is not None:
        _draw(session.results(), arguments.plot)
    return 1 if session.failed else 0


def plan_of(rows: int, depth: int, vocab: int) -> str:
    """Forward and backward, logits made again."""
    half = torch.bfloat16
    sizes = Sizes(rows=rows, depth=depth, vocab=vocab, dtype=half, factors=half, gpu=True)
    backward = plan_backward(sizes, "recompute", (True, True, False), masked=True)
    return f"forward: {plan_forward(sizes, 'recompute').describe()}\nbackward: {backward.describe()}"


def gpu_provenance() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


class Session:
    """Rows as they come, and what happened to the cases that have none."""

    def __init__(self, origin: dict[str, Any], path: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[Note] = []
        self.failed = False
        self._origin = {**origin, "ceilings": None, "not_measured": self.notes}
        self._run = f"{origin['date']} {os.getpid()}"
        self._path = path

    def results(self) -> dict[str, Any]:
        return {"format": 1, "runs": {self._run: self._origin}, "rows": self.rows}

    def measure(
        self, cases: Sequence[GpuCase], settings: Settings, deadline: float, *, without: Sequence[str] = ()
    ) -> None:
        """In order, until `deadline` of the monotonic clock; without some of the implementations."""
        pending = list(cases)
        left_out: dict[str, str] = {}
        while pending and time.monotonic() < deadline:
            config = {
                "device": "cuda",
                "ceilings": self._origin["ceilings"] is None,
                "settings": dataclasses.asdict(dataclasses.replace(settings, left_out=left_out)),
                "without": list(without),
                "cases": [dataclasses.asdict(case) for case in pending],
            }
            lost: list[str] = []

            def receive(message: dict[str, Any], lost: list[str] = lost) -> None:
                if "ceilings" in message:
                    self._origin["ceilings"] = message["ceilings"]
                    print(", ".join(f"{name} {value:.0f}" for name, value in message["ceilings"].items()), flush=True)
                elif "lost" in message:
                    lost.append(message["lost"])
                elif "failed" in message:
                    self._note(pending.pop(0), message["failed"], failed=True)
                else:
                    pending.pop(0)
                    self._keep(message["rows"])

            ended = run_worker(config, receive, deadline)
            if lost:
                left_out[lost[0]] = "broke the GPU's state for everybody after it"
            elif pending and time.monotonic() < deadline:
                self._note(pending.pop(0), ended, failed=True)
        for case in pending:
            self._note(case, "time was over", failed=False)
        self._write()

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["run"] = self._run
            for figures in row["contenders"].values():
                figures.update(shares(figures, self._origin["ceilings"]))
        self.rows.extend(rows)
        self._write()
        print_rows(rows)

    def _note(self, case: GpuCase, reason: str, *, failed: bool) -> None:
        self.notes.append({"case": str(case), "reason": reason})
        self.failed |= failed
        self._write()

    def _write(self) -> None:
        if self._path is not None and self._origin["ceilings"] is not None:
            _results.write(self._path, self.results())


def shares(figures: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float | None]:
    """Of the copy bandwidth and of the product rate of the same run; None where a contender has no such figure."""
    bandwidth, rate = figures["gb_per_s"], figures["gflop_per_s"]
    return {
        "of_copy": None if bandwidth is None else bandwidth / ceilings["copy_gb_per_s"],
        "of_product": None if rate is None else rate / 1e3 / ceilings["product_tflop_per_s"],
    }


def run_worker(config: dict[str, Any], receive: Callable[[dict[str, Any]], None], deadline: float) -> str:
    """Hands over its messages until it ends, or is ended, and says why it did.

    It is ended at the deadline, or when it has said nothing for CASE_SECONDS.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "bench.gpu._worker", json.dumps(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None

        def limit() -> threading.Timer:
            timer = threading.Timer(max(0.0, min(CASE_SECONDS, deadline - time.monotonic())), worker.kill)
            timer.daemon = True
            timer.start()
            return timer

        timer = limit()
        try:
            for line in worker.stdout:
                timer.cancel()
                receive(json.loads(line))
                timer = limit()
        except BaseException:
            worker.kill()
            raise
        finally:
            timer.cancel()
    if worker.returncode == -9:
        return f"took more than {CASE_SECONDS:g} seconds"
    return f"its process ended with code {worker.returncode}"


def _draw(results: dict[str, Any], path: str) -> None:
    if not results["rows"]:
        print("no picture: no rows")
        return
    try:
        from bench.gpu._plot import draw
    except ImportError as problem:
        print(f"no picture: {problem}")
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    draw(results, path)
