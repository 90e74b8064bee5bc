"""Timing by CUDA events (torch's name for those of AMD too), each run on a cold cache, and the device's ceilings."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Contender
from bench._harness import Plan

# 25 runs to warm up and 100 timed, as everybody does; fewer of what takes longer than the budget for them.
WARM_UP, TIMED, LEAST_WARM_UP, LEAST_TIMED = 25, 100, 3, 10
# Written before each run: five times the second-level cache of an H200, and as large as the last one of an MI300X.
COLD_BYTES = 256 << 20

COPY_BYTES, PRODUCT_SIZE = 4 << 30, 8192


class DeviceLost(Exception):
    """A contender has left the GPU so that nothing runs there any more; a new process can go on without it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class CudaClock:
    """A clock (bench/_harness.py) of what runs on the current GPU."""

    def __init__(self, device: str = "cuda", cold_bytes: int = COLD_BYTES) -> None:
        self._cold = torch.empty(cold_bytes // 4, dtype=torch.int32, device=device)
        self._host: dict[str, list[float]] = {}

    def once(self, contender: Contender) -> tuple[Sequence[Tensor], float]:
        if contender.prepare is not None:
            contender.prepare()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = contender.run()
        torch.cuda.synchronize()
        return result, time.perf_counter() - begin

    def plan(self, contender: Contender, seconds: float, budget: float) -> Plan:
        seconds = min(seconds, self.once(contender)[1])  # the first run may have compiled
        affordable = budget / max(seconds, 1e-9)
        for _ in range(round(min(WARM_UP, max(LEAST_WARM_UP, affordable / 4)))):
            if contender.prepare is not None:
                contender.prepare()
            contender.run()
        torch.cuda.synchronize()
        self._host[contender.name] = []
        return Plan(contender, round(min(TIMED, max(LEAST_TIMED, affordable))), 1)

    def seconds(self, plan: Plan) -> float:
        """Between two events around the run, which is queued while the cache is made cold."""
        if plan.contender.prepare is not None:
            plan.contender.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._cold.zero_()
        begin.record()
        queued = time.perf_counter()
        result = plan.contender.run()
        self._host[plan.contender.name].append(time.perf_counter() - queued)
        end.record()
        torch.cuda.synchronize()
        del result
        return float(begin.elapsed_time(end)) / 1e3

    def peak_mib(self, contender: Contender) -> tuple[float, float] | None:
        """Of memory that torch allocated."""
        if contender.prepare is not None:
            contender.prepare()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = contender.run()
        torch.cuda.synchronize()
        peak = max(0.0, (torch.cuda.max_memory_allocated() - before) / 2**20)
        outputs = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() / 2**20 for x in result}
        return peak, max(0.0, peak - sum(outputs.values()))

    def figures(self, name: str, times: Sequence[float]) -> dict[str, float]:
        """Milliseconds of the 20th and the 80th percentile, and microseconds until the host has queued a run."""
        low, high = percentiles(times)
        return {"p20_ms": low * 1e3, "p80_ms": high * 1e3, "host_us": statistics.median(self._host[name]) * 1e6}

    def recover(self, name: str) -> None:
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what a rival took before it ran out of memory
        except RuntimeError as problem:
            raise DeviceLost(name) from problem


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], fifths[3]


def measure_ceilings(clock: CudaClock) -> dict[str, Any]:
    """GB/s of copying a large bfloat16 buffer, counted both ways, and TF/s of an 8192^3 product of bfloat16."""
    source = torch.zeros(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    destination = torch.empty_like(source)
    copy = _median(clock, Contender(name="copy", family="ceiling", run=lambda: (destination.copy_(source),)))
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = _median(clock, Contender(name="product", family="ceiling", run=lambda: (torch.mm(a, b, out=out),)))
    return {"copy_gb_per_s": 2 * COPY_BYTES / copy / 1e9, "product_tflop_per_s": 2 * PRODUCT_SIZE**3 / product / 1e12}


def _median(clock: CudaClock, contender: Contender) -> float:
    plan = clock.plan(contender, clock.once(contender)[1], budget=1.0)
    return statistics.median(clock.seconds(plan) for _ in range(plan.rounds))
