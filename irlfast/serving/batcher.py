"""A bounded queue of requests, and batches that form while the model is busy.

One thread judges one batch at a time. While it does, requests gather; the next batch is what has gathered. Where the
model was idle, the first request waits a little for others. A request is judged whole, in one batch, so that its rows
are all judged by one version of the reward.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple

from irlfast.data import DataError, Demonstration
from irlfast.scorer import Score

from .metrics import Metrics

_log = logging.getLogger(__name__)


class Judged(NamedTuple):
    """A request's scores in the order of its rows, or why a row has none, and the reward's version."""

    scores: list[Score | DataError]
    version: str


Judge = Callable[[Sequence[Demonstration], bool], Judged]
"""From rows, and whether rewards of tokens are asked for, to their scores."""


class QueueFullError(Exception):
    """The queue has no room for the request.

    Attributes:
        retry_after: seconds, about how long what waits now will take.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(eq=False)
class _Request:
    rows: list[Demonstration]
    tokens: bool
    since: float
    answer: asyncio.Future[Judged] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Gathers requests of one event loop into batches.

    Args:
        judge: called in `executor`.
        executor: of one thread.
        batch_size: rows at which a batch does not wait for more.
        gather: rows of a batch at most; a request with more is a batch by itself. Where they are more than one pass of
            the model takes, the judge sorts them by length, so that less is padding.
        wait: seconds that a request waits at most for others while the model is idle.
        limit: rows that may wait.
        metrics: where sizes and durations are counted.
    """

    def __init__(
        self,
        judge: Judge,
        executor: Executor,
        *,
        batch_size: int,
        gather: int,
        wait: float,
        limit: int,
        metrics: Metrics,
    ) -> None:
        self._judge = judge
        self._executor = executor
        self._batch_size = batch_size
        self._gather = gather
        self._wait = wait
        self.limit = limit
        self._metrics = metrics
        self._requests: deque[_Request] = deque()
        self._batch: list[_Request] = []
        self._arrived, self._enough = asyncio.Event(), asyncio.Event()
        self._rows_per_second = 0.0
        self.waiting = 0
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def submit(self, rows: list[Demonstration], *, tokens: bool = False) -> Judged:
        """Judge rows; cancelled, they leave the queue.

        Raises:
            QueueFullError: no room now. ValueError: more rows than the queue ever holds.
            Exception: what the reward model raised.
        """
        if len(rows) > self.limit:
            raise ValueError(f"{len(rows)} rows in one request, expected at most {self.limit}: send several requests")
        if self._task.done():
            raise RuntimeError("the batcher has ended, and its log says why")
        if self.waiting + len(rows) > self.limit:
            self._metrics.rejected_rows += len(rows)
            raise QueueFullError(
                f"{self.waiting} rows wait and at most {self.limit} may: {len(rows)} more were not taken",
                self._retry_after(),
            )
        request = _Request(rows, tokens, asyncio.get_running_loop().time())
        self._requests.append(request)
        self.waiting += len(rows)
        self._arrived.set()
        if self.waiting >= self._batch_size:
            self._enough.set()
        try:
            return await request.answer
        except asyncio.CancelledError:
            if request in self._requests:
                self._requests.remove(request)
                self.waiting -= len(rows)
            raise

    def hurry(self) -> None:
        """Let no request wait for others any more."""
        self._wait = 0.0
        self._enough.set()

    async def close(self) -> None:
        """Stop; whoever still waits is cancelled."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for request in (*self._batch, *self._requests):
            request.answer.cancel()

    async def _run(self) -> None:
        try:
            await self._answer_batches()
        except Exception as error:
            _log.exception("the batcher has ended")
            for request in (*self._batch, *self._requests):
                if not request.answer.done():
                    request.answer.set_exception(error)

    async def _answer_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if not self._requests:
                await self._arrived.wait()
                continue
            deadline = self._requests[0].since + self._wait
            if self.waiting < self._batch_size and loop.time() < deadline:
                self._enough.clear()
                timer = loop.call_at(deadline, self._enough.set)
                await self._enough.wait()
                timer.cancel()
            self._batch = self._take()
            if self._batch:
                await self._answer(self._batch)

    def _take(self) -> list[_Request]:
        """The oldest requests of one kind that fit in a batch."""
        batch: list[_Request] = []
        rows = 0
        while self._requests:
            first = self._requests[0]
            if batch and (rows + len(first.rows) > self._gather or first.tokens != batch[0].tokens):
                break
            batch.append(self._requests.popleft())
            rows += len(first.rows)
        self.waiting -= rows
        return batch

    async def _answer(self, batch: list[_Request]) -> None:
        loop = asyncio.get_running_loop()
        rows = [row for request in batch for row in request.rows]
        start = loop.time()
        try:
            judged = await loop.run_in_executor(self._executor, self._judge, rows, batch[0].tokens)
        except Exception as error:
            if len(batch) == 1:
                _log.exception("the reward model failed on a request of %d rows", len(rows))
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            # One request may be what the others fail with.
            _log.warning(
                "the reward model failed on a batch of %d requests, each is tried alone: %r", len(batch), error
            )
            for request in batch:
                await self._answer([request])
            return
        seconds = loop.time() - start
        rate = len(rows) / max(seconds, 1e-6)
        self._rows_per_second = rate if not self._rows_per_second else 0.9 * self._rows_per_second + 0.1 * rate
        self._metrics.batch_rows.observe(len(rows))
        self._metrics.batch_seconds.observe(seconds)
        done = 0
        for request in batch:
            part = judged.scores[done : done + len(request.rows)]
            done += len(request.rows)
            if not request.answer.done():
                request.answer.set_result(Judged(part, judged.version))

    def _retry_after(self) -> int:
        return max(1, math.ceil(self.waiting / self._rows_per_second)) if self._rows_per_second else 1
