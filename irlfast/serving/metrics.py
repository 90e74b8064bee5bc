"""Counters and histograms in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Histogram:
    """How many values were at most each of some bounds.

    Args:
        bounds: upper bounds, rising.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        so_far = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {so_far}"


class Metrics:
    """What a server counts."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.reloads: Counter[str] = Counter()
        """By what came of it: loaded, unchanged, refused."""
        self.rejected_rows = 0
        self.request_seconds = Histogram(_SECONDS)
        self.batch_rows = Histogram(_ROWS)
        self.batch_seconds = Histogram(_SECONDS)

    def text(self, *, waiting: int, version: str) -> str:
        """All of it, with the rows that wait now and the version of the reward in service."""
        lines: list[str] = []

        def metric(name: str, kind: str, meaning: str, samples: Iterator[str]) -> None:
            lines.extend((f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples))

        by_status = (
            f'irlfast_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        )
        metric("irlfast_requests_total", "counter", "Requests answered.", by_status)
        by_result = (f'irlfast_reloads_total{{result="{name}"}} {n}' for name, n in sorted(self.reloads.items()))
        metric("irlfast_reloads_total", "counter", "Reloads of the reward.", by_result)
        for name, kind, meaning, value in (
            ("irlfast_rejected_rows_total", "counter", "Rows refused with 503.", self.rejected_rows),
            ("irlfast_waiting_rows", "gauge", "Rows in the queue.", waiting),
            (f'irlfast_reward_info{{version="{version}"}}', "gauge", "The reward in service.", 1),
        ):
            metric(name.partition("{")[0], kind, meaning, iter([f"{name} {value}"]))
        for name, meaning, histogram in (
            ("irlfast_request_seconds", "From a request's headers to its answer.", self.request_seconds),
            ("irlfast_batch_rows", "Rows of a batch.", self.batch_rows),
            ("irlfast_batch_seconds", "Tokenising and judging a batch.", self.batch_seconds),
        ):
            metric(name, "histogram", meaning, histogram.lines(name))
        return "\n".join(lines) + "\n"
