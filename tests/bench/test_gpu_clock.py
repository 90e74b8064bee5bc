"""The clock of CUDA events, on a made-up GPU whose time is a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench._case import OURS, Bar, Contender, Pass, Truth
from bench._harness import Plan, Settings, measure_pass
from bench.gpu import _clock
from bench.gpu._clock import CudaClock, DeviceLost, percentiles

Run = Callable[[], tuple[Tensor, ...]]


class Gpu:
    """What happens on it, in order; each run takes the milliseconds that it is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.allocated = self.peak = 0
        self.broken = False

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.log.append("wait")

    def run(self, name: str, milliseconds: float, allocates: int = 0) -> Run:
        def run() -> tuple[Tensor, ...]:
            self.log.append(name)
            self.now += milliseconds
            self.peak = max(self.peak, self.allocated + allocates)
            return (torch.ones(4),)

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1.0

        def record(self) -> None:
            device.log.append("event")
            self.at = device.now

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def reset() -> None:
        device.peak = device.allocated

    for name, value in {
        "Event": Event,
        "synchronize": device.synchronize,
        "empty_cache": lambda: device.log.append("empty cache"),
        "reset_peak_memory_stats": reset,
        "memory_allocated": lambda: device.allocated,
        "max_memory_allocated": lambda: device.peak,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def contender(run: Run, name: str = "x", **rest: Any) -> Contender:
    return Contender(name=name, family=rest.pop("family", "ours"), run=run, **rest)


def test_a_timing_is_between_events_around_the_run_on_a_cold_cache(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CudaClock("cpu", 64)
    monkeypatch.setattr(clock, "_cold", Zeroed(gpu))
    one = contender(gpu.run("run", 3.0), prepare=lambda: gpu.log.append("prepare"))
    clock._host["x"] = []
    assert clock.seconds(Plan(one, 1, 1)) == pytest.approx(3e-3)
    assert gpu.log == ["prepare", "wait", "cold", "event", "run", "event", "wait"]


class Zeroed:
    """Takes time too, which is not the contender's."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def zero_(self) -> None:
        self._gpu.log.append("cold")
        self._gpu.now += 50.0


@pytest.mark.parametrize(
    ("seconds", "warm_up", "timed"), [(1e-4, 25, 100), (8e-3, 25, 100), (0.05, 5, 20), (0.1, 3, 10), (2.0, 3, 10)]
)
def test_25_runs_warm_up_and_100_are_timed_where_the_budget_allows(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, seconds: float, warm_up: int, timed: int
) -> None:
    clock = CudaClock("cpu", 64)
    monkeypatch.setattr(clock, "once", lambda contender: ((), seconds))
    plan = clock.plan(contender(gpu.run("run", 1.0)), 9.0, budget=1.0)  # the first run compiled
    assert gpu.log.count("run") == warm_up
    assert (plan.rounds, plan.repeats) == (timed, 1)


def test_peak_memory_is_what_a_run_adds(gpu: Gpu) -> None:
    gpu.allocated = 1 << 30  # inputs
    peak, extra = CudaClock("cpu", 64).peak_mib(contender(gpu.run("run", 1.0, allocates=64 << 20))) or (0, 0)
    assert peak == 64
    assert extra == pytest.approx(64 - 16 / 2**20)  # less the four floats that it returns


def test_percentiles_of_a_hundred() -> None:
    assert percentiles([float(i) for i in range(101)]) == (20.0, 80.0)


def pass_of(*rivals: Contender, gpu: Gpu) -> Pass:
    mine = contender(gpu.run(OURS, 2.0), OURS)
    bars = [Bar(kind="speedup", against="peer", limit=1)]
    truth = [Truth(name="ones", value=torch.ones(4, dtype=torch.float64))]
    return Pass(name="f", contenders=[mine, *rivals], bars={OURS: bars}, truth=truth, tolerance=1e-6, nbytes=4000)


def test_a_row_has_percentiles_memory_and_the_time_of_the_host(gpu: Gpu) -> None:
    rival = contender(gpu.run("rival", 6.0), "rival", family="peer")
    (row,) = measure_pass(pass_of(rival, gpu=gpu), "caching", Settings(memory=True), CudaClock("cpu", 64))
    mine = row["contenders"][OURS]
    assert (mine["median_ms"], mine["p20_ms"], mine["p80_ms"]) == pytest.approx((2.0, 2.0, 2.0))
    assert mine["rounds"] == 100
    assert mine["gb_per_s"] == pytest.approx(4000 / 2e-3 / 1e9)
    assert mine["peak_mib"] == 0
    assert 0 < mine["host_us"] < 1e5
    assert row["contenders"]["rival"]["ratio"] == pytest.approx(3.0)
    assert row["verdicts"][0]["met"] is True


def test_a_rival_that_fails_gives_its_memory_back(gpu: Gpu) -> None:
    def fail() -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    rival = contender(fail, "rival", family="eager")
    (row,) = measure_pass(pass_of(rival, gpu=gpu), "caching", Settings(), CudaClock("cpu", 64))
    assert "out of memory" in row["skipped"]["rival"]
    assert "empty cache" in gpu.log


def test_a_rival_that_breaks_the_gpu_is_named(gpu: Gpu) -> None:
    def fail() -> tuple[Tensor, ...]:
        gpu.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rival = contender(fail, "rival", family="peer")
    with pytest.raises(DeviceLost, match="rival"):
        measure_pass(pass_of(rival, gpu=gpu), "caching", Settings(), CudaClock("cpu", 64))
    gpu.broken = False
    settings = Settings(left_out={"rival": "broke the GPU"})
    (row,) = measure_pass(pass_of(rival, gpu=gpu), "caching", settings, CudaClock("cpu", 64))
    assert row["skipped"] == {"rival": "broke the GPU"}


def test_ceilings_count_both_ways_and_every_operation(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2e-3, 1e-3])
    monkeypatch.setattr(_clock, "_median", lambda clock, contender: next(seconds))
    for name in ("zeros", "randn"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, make=make, **options: make(*shape, device="meta"))
    ceilings = _clock.measure_ceilings(CudaClock("cpu", 64))
    assert ceilings == pytest.approx({"copy_gb_per_s": 8 * 2**30 / 2e-3 / 1e9, "product_tflop_per_s": 2 * 8.192**3})
