"""The command behind `python -m bench all` and `python -m bench OP`: chooses cases and runs a process for each lot."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import _results
from bench._case import MALLOCS, Case
from bench._harness import Settings
from bench._report import print_rows, print_summary

ROOT = Path(__file__).parents[1]

# glibc hands every large block back to the kernel, which then faults it in again page by page; "tuned" keeps them.
# Half of eager's time is those faults, so a fair comparison shows both.
MALLOC_ENVIRONMENT: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
}

Lot = tuple[str, list[Case]]  # allocator setting, cases of one op, line and shape


# Modules of this package that are commands of their own.
_COMMANDS = ("table", "cuda_resources")


def op_modules() -> list[str]:
    """Names of the modules of this package that declare cases, or will: all but commands and what is private."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in _COMMANDS)


def shape_of(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected positive integers as in 1024x50304")
    return shape


def comma_separated(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if allowed and name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def parser(target: str) -> argparse.ArgumentParser:
    about = "every op" if target == "all" else target
    result = argparse.ArgumentParser(
        prog=f"python -m bench {target}",
        description=f"Measures {about} beside eager PyTorch, torch.compile and peers; docs/performance.md explains it.",
    )
    result.add_argument(
        "--json", metavar="FILE", help="keep the results there; what the file holds stays, or is renewed"
    )
    result.add_argument("--plot", metavar="FILE", help="draw the results there, as PNG")
    result.add_argument("--missing", action="store_true", help="measure only what the --json file lacks")
    result.add_argument("--quick", action="store_true", help="each line's first shape, tuned allocator, few rounds")
    result.add_argument("--lines", type=comma_separated(), metavar="A,B", help="only these lines of the table")
    result.add_argument("--dtypes", type=comma_separated("float32", "bfloat16", "float16"), metavar="DTYPE,...")
    result.add_argument("--malloc", type=comma_separated(*MALLOCS), metavar="SETTING,...", help="tuned, default")
    result.add_argument("--shape", type=shape_of, metavar="1024x50304", help="instead of the cases' own shapes")
    result.add_argument("--scale", type=float, default=1.0, help="multiplies the rows, for other machines")
    result.add_argument(
        "--skip", type=comma_separated("eager", "compile", "peer"), default=(), metavar="FAMILY,...",
        help="leave out eager, compile or peer contenders",
    )  # fmt: skip
    result.add_argument("--budget", type=float, help="seconds of rounds for each contender; default 0.5, quick 0.1")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--no-tests", action="store_true", help="do not run the ops' tests first")
    return result


def choose(cases: Iterable[Case], arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ValueError: a line that no case has, or nothing left.
    """
    cases = list(cases)
    if arguments.lines is not None:
        unknown = set(arguments.lines) - {case.line for case in cases}
        if unknown:
            known = ", ".join(dict.fromkeys(case.line for case in cases))
            raise ValueError(f"no case has line {', '.join(sorted(unknown))}; there are {known}")
        cases = [case for case in cases if case.line in arguments.lines]
    if arguments.dtypes is not None:
        cases = [case for case in cases if case.dtype in arguments.dtypes]
    if arguments.quick or arguments.shape is not None:
        first = {(case.op, case.line, case.work): case.shape for case in reversed(cases)}
        cases = [case for case in cases if case.shape == first[case.op, case.line, case.work]]
    if arguments.shape is not None:
        ranks = {len(case.shape) for case in cases}
        if ranks != {len(arguments.shape)}:
            raise ValueError(
                f"--shape has {len(arguments.shape)} numbers, the chosen cases {', '.join(map(str, sorted(ranks)))}; "
                "choose cases of one kind with --lines"
            )
        cases = [dataclasses.replace(case, shape=arguments.shape) for case in cases]
    if arguments.scale <= 0:
        raise ValueError(f"--scale is {arguments.scale}; expected a positive number")
    wanted = arguments.malloc or (("tuned",) if arguments.quick else None)
    if wanted is not None:
        cases = [dataclasses.replace(case, mallocs=wanted) for case in cases]
    cases = [case.scaled(arguments.scale) for case in cases]
    if not cases:
        raise ValueError("the options leave no case to measure")
    return cases


def lots(cases: Sequence[Case], done: Iterable[_results.Key], threads: int) -> list[Lot]:
    """Cases of one op, line and shape, once for each allocator setting, less those done."""
    done = set(done)
    result: list[Lot] = []
    for _, group in itertools.groupby(cases, key=lambda case: (case.op, case.line, case.shape)):
        together = list(group)
        for malloc in MALLOCS:
            rest = [
                case
                for case in together
                if malloc in case.mallocs
                and _results.case_key({**dataclasses.asdict(case), "malloc": malloc, "threads": threads}) not in done
            ]
            if rest:
                result.append((malloc, rest))
    return result


def run_lot(lot: Lot, threads: int, settings: Settings, keep: Callable[[list[dict[str, Any]]], None]) -> bool:
    """Measures a lot in a process of its own, hands over rows as they come, and says whether all came."""
    malloc, cases = lot
    # Memory that "tuned" keeps hides what a run needs; it is measured there only where nothing else is.
    memory = malloc == "default" or all(case.mallocs == (malloc,) for case in cases)
    config = {
        "malloc": malloc,
        "threads": threads,
        "settings": dataclasses.asdict(dataclasses.replace(settings, memory=memory)),
        "cases": [dataclasses.asdict(case) for case in cases],
    }
    with subprocess.Popen(
        [sys.executable, "-m", "bench._worker", json.dumps(config)],
        cwd=ROOT,
        env={**os.environ, **MALLOC_ENVIRONMENT[malloc]},
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                keep(json.loads(line))
        except BaseException:
            worker.kill()
            raise
    return worker.returncode == 0


def tests_pass(op: str) -> bool:
    """Runs the op's tests, or those that its benchmark names; their output is shown where they fail."""
    tests = getattr(importlib.import_module(f"bench.{op}"), "TESTS", f"tests/ops/test_{op}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / tests)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def main(target: str, argv: list[str]) -> int:
    """`python -m bench all` or `python -m bench OP`."""
    options = parser(target)
    arguments = options.parse_args(argv)
    if arguments.missing and arguments.json is None:
        options.error("--missing needs --json FILE, the file to complete")
    ops = op_modules() if target == "all" else [target]
    declared = [case for op in ops for case in importlib.import_module(f"bench.{op}").CASES]
    declared.sort(key=lambda case: case.line)  # stable: within a line, cases stand as declared
    try:
        cases = choose(declared, arguments)
    except ValueError as problem:
        options.error(str(problem))
    results = _results.empty()
    if arguments.json is not None and Path(arguments.json).exists():
        results = _results.read(arguments.json)
    settings = Settings(
        budget=arguments.budget or (0.1 if arguments.quick else Settings.budget), skip=tuple(arguments.skip)
    )
    for op in dict.fromkeys(case.op for case in cases):
        if not arguments.no_tests and not tests_pass(op):
            print(f"{op} fails its tests: no figures", file=sys.stderr)
            return 1

    origin = _results.provenance(shlex.join(["python", "-m", "bench", target, *argv]))
    run = f"{origin['date']} {os.getpid()}"
    print(f"{origin['machine']}, {arguments.threads} threads of {origin['cores']}, {origin['isa']}", flush=True)
    print(f"torch {origin['torch']}, load average at the start {origin['load_average']}", flush=True)
    fresh: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal results
        for row in rows:
            row["run"] = run
        fresh.extend(rows)
        results = _results.merge([results, {"runs": {run: origin}, "rows": rows}])
        if arguments.json is not None:
            _results.write(arguments.json, results)
        print_rows(rows)

    done = map(_results.case_key, results["rows"]) if arguments.missing else ()
    begin = time.perf_counter()
    failed = [
        lot for lot in lots(cases, done, arguments.threads) if not run_lot(lot, arguments.threads, settings, keep)
    ]
    print_summary(results["rows"] if arguments.missing else fresh)
    print(f"\n{len(fresh)} rows in {(time.perf_counter() - begin) / 60:.1f} minutes")
    if arguments.plot is not None:
        from bench._plot import draw

        draw(results, arguments.plot)
    for malloc, together in failed:
        print(f"not measured, see above: {'; '.join(map(str, together))}; malloc {malloc}", file=sys.stderr)
    return 1 if failed else 0
