"""Measures one pass: every contender checked against float64, timed in turn, its peak memory taken."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench._case import Bar, Contender, Pass, Truth, judge

# A rival slower than SLOW seconds has LEAST_ROUNDS - 1: it stands far from where a verdict could tip.
LEAST_ROUNDS, MOST_ROUNDS, SLOW = 3, 30, 1.0

# Families that do other work than what a pass asks for.
UNRIVALLED = ("ceiling", "yardstick")

# A call shorter than this is repeated within one timing until it lasts as long.
LEAST_SECONDS = 2e-3


class WrongResult(Exception):
    """A contender whose outputs are not those of float64."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        budget: seconds that a contender may take for its rounds, of which there are at least LEAST_ROUNDS.
        memory: whether to measure peak memory, which takes one more run of each.
        skip: families that do not take part.
        left_out: contenders that do not take part, with the reason.
    """

    budget: float = 0.5
    memory: bool = False
    skip: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


class Clock(Protocol):
    """How runs on a device are timed."""

    def once(self, contender: Contender) -> tuple[Sequence[Tensor], float]:
        """Outputs of one run, and about how many seconds it took."""

    def plan(self, contender: Contender, seconds: float, budget: float) -> Plan:
        """How often to time a contender that takes so many seconds; warms up where that is usual."""

    def seconds(self, plan: Plan) -> float:
        """Of one timing."""

    def peak_mib(self, contender: Contender) -> tuple[float, float] | None:
        """MiB that one run needs at most above its inputs, and above inputs and outputs; None where nobody knows."""

    def figures(self, name: str, times: Sequence[float]) -> dict[str, float]:
        """What a row says of a contender's times besides the median."""

    def recover(self, name: str) -> None:
        """Called after a rival has failed; raises where nothing can be measured any more."""


def measure_pass(work: Pass, malloc: str, settings: Settings, clock: Clock | None = None) -> list[dict[str, Any]]:
    """One row for each of our contenders in the pass. Without a clock, the host's.

    Raises:
        WrongResult: one of ours is wrong. A rival that is wrong or cannot run here is left out, and its row says why.
    """
    clock = clock or HostClock()
    skipped = dict(work.skipped)
    errors: dict[str, dict[str, float]] = {}
    plans: list[Plan] = []
    memory: dict[str, tuple[float, float] | None] = {}
    with torch.set_grad_enabled(work.grad):
        for contender in work.contenders:
            if contender.family in settings.skip:
                skipped[contender.name] = f"{contender.family} contenders were left out on request"
                continue
            if contender.name in settings.left_out:
                skipped[contender.name] = settings.left_out[contender.name]
                continue
            try:
                errors[contender.name], seconds = _try_out(contender, work.truth, work.tolerance, clock)
            except Exception as problem:
                if contender.family in ("ours", *UNRIVALLED):
                    raise
                skipped[contender.name] = f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}"
                clock.recover(contender.name)
                continue
            if settings.memory and contender.family != "ceiling":
                memory[contender.name] = clock.peak_mib(contender)
            plans.append(clock.plan(contender, seconds, settings.budget))
        times = time_in_turn(plans, clock.seconds)
    rows = []
    for subject, bars in work.bars.items():
        figures = {
            plan.contender.name: {
                "family": plan.contender.family,
                "rounds": len(times[plan.contender.name]),
                "median_ms": statistics.median(times[plan.contender.name]) * 1e3,
                **clock.figures(plan.contender.name, times[plan.contender.name]),
                "ratio": paired_ratio(times[plan.contender.name], times[subject]),
                **_rates(plan.contender, work, statistics.median(times[plan.contender.name])),
                **_memory_figures(memory.get(plan.contender.name)),
                "error": errors[plan.contender.name],
            }
            for plan in plans
        }
        rows.append(
            {
                "pass": work.name,
                "subject": subject,
                "malloc": malloc,
                "contenders": figures,
                "skipped": skipped,
                "verdicts": _verdicts(bars, subject, malloc, figures),
            }
        )
    return rows


def _verdicts(
    bars: Sequence[Bar], subject: str, malloc: str, figures: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    return [judge(bar, subject, figures) for bar in bars if bar.malloc in (None, malloc)]


def _rates(contender: Contender, work: Pass, seconds: float) -> dict[str, float | None]:
    nbytes = contender.nbytes or work.nbytes
    return {
        "gb_per_s": nbytes / seconds / 1e9 if nbytes else None,
        "gflop_per_s": work.flop / seconds / 1e9 if work.flop and contender.family not in UNRIVALLED else None,
    }


def _memory_figures(measured: tuple[float, float] | None) -> dict[str, float | None]:
    peak, extra = measured or (None, None)
    return {"peak_mib": peak, "extra_mib": extra}


def _try_out(
    contender: Contender, truth: Sequence[Truth], tolerance: float, clock: Clock
) -> tuple[dict[str, float], float]:
    """Largest absolute error of each output, and how long a run takes about."""
    result, seconds = clock.once(contender)
    errors = {} if contender.family in UNRIVALLED else check(contender.name, result, truth, tolerance)
    del result
    if contender.family == "compile" or seconds < 0.1:  # the first run compiled, or filled caches
        seconds = clock.once(contender)[1]
    return errors, seconds


def _run_once(contender: Contender) -> tuple[Sequence[Tensor], float]:
    if contender.prepare is not None:
        contender.prepare()
    begin = time.perf_counter()
    result = contender.run()
    return result, time.perf_counter() - begin


def check(name: str, result: Sequence[Tensor], truth: Sequence[Truth], tolerance: float) -> dict[str, float]:
    """Largest absolute error of each output against float64.

    Raises:
        WrongResult: errors beyond the tolerance, relative to the largest value, or in sum to the sum of magnitudes;
            NaN where the truth has none; outputs missing.
    """
    if len(result) != len(truth):
        raise WrongResult(f"{name} returns {len(result)} outputs, expected {', '.join(t.name for t in truth)}")
    errors = {}
    for value, exact in zip(result, truth, strict=True):
        found = value.detach()[exact.select].double()
        if found.shape != exact.value.shape:
            raise WrongResult(f"{name}: {exact.name} has shape {tuple(found.shape)}, not {tuple(exact.value.shape)}")
        error = (found - exact.value).abs()
        largest, total = (float(x) for x in (error.amax(), error.sum()))
        for what, wrong, scale in (
            ("largest", largest, exact.value.abs().amax()),
            ("summed", total, exact.value.abs().sum()),
        ):
            if not wrong <= tolerance * float(scale):
                raise WrongResult(
                    f"{name}: {exact.name} is wrong, its {what} error is {wrong:.3g} beside {float(scale):.3g}, "
                    f"and {tolerance:g} of that is allowed"
                )
        errors[exact.name] = largest
    return errors


@dataclass(frozen=True)
class Plan:
    contender: Contender
    rounds: int
    repeats: int

    @classmethod
    def of(cls, contender: Contender, seconds: float, budget: float) -> Plan:
        repeats = 1
        if contender.prepare is None:
            repeats = max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-7)))
        rounds = int(budget / max(seconds * repeats, 1e-7))
        least = LEAST_ROUNDS - (contender.family in ("eager", "compile", "peer") and seconds > SLOW)
        return cls(contender, min(max(rounds, least), MOST_ROUNDS), repeats)


def time_in_turn(plans: Sequence[Plan], seconds: Callable[[Plan], float]) -> dict[str, list[float]]:
    """Seconds of each contender in each of its rounds.

    A round runs all that have rounds left, beginning with another one each time. Ours take part in every round, so
    that each other time has theirs beside it.
    """
    times: dict[str, list[float]] = {plan.contender.name: [] for plan in plans}
    # What torch's modules hold need not be looked through for garbage in the middle of somebody's turn.
    gc.collect()
    gc.freeze()
    try:
        most = max(plan.rounds for plan in plans if plan.contender.family == "ours")
        for turn in range(most):
            start = turn % len(plans)
            for plan in [*plans[start:], *plans[:start]]:
                if plan.contender.family == "ours" or turn < plan.rounds:
                    times[plan.contender.name].append(seconds(plan))
    finally:
        gc.unfreeze()
    return times


def _seconds(plan: Plan) -> float:
    run: Callable[[], Any] = plan.contender.run
    if plan.contender.prepare is not None:
        plan.contender.prepare()
    if plan.repeats == 1:
        begin = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - begin
        del result  # freeing is not timed
        return elapsed
    begin = time.perf_counter()
    for _ in range(plan.repeats):
        run()
    return (time.perf_counter() - begin) / plan.repeats


def paired_ratio(other: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of both of other / ours within the round, which a busy machine disturbs least."""
    return statistics.median(a / b for a, b in zip(other, ours, strict=False))


def peak_mib(contender: Contender) -> tuple[float, float] | None:
    """MiB of resident memory that one run needs at most above its inputs, and above inputs and outputs.

    None outside Linux, or where the kernel does not let the peak be reset.
    """
    if contender.prepare is not None:
        contender.prepare()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide what the run needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    except (OSError, AttributeError):
        return None
    before = _status_mib("VmRSS")
    result = contender.run()
    peak = max(0.0, _status_mib("VmHWM") - before)
    outputs = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() / 2**20 for x in result}
    return peak, max(0.0, peak - sum(outputs.values()))


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class HostClock:
    """Timed by the host, which does the work."""

    once = staticmethod(_run_once)
    plan = staticmethod(Plan.of)
    seconds = staticmethod(_seconds)
    peak_mib = staticmethod(peak_mib)

    def figures(self, name: str, times: Sequence[float]) -> dict[str, float]:
        return {}

    def recover(self, name: str) -> None:
        pass
