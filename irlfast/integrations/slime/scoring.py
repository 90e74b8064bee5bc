"""Samples judged on one thread: what arrives while a batch is being judged forms the next.

slime asks for one sample at a time, from an event loop that must not be held up. Futures are answered by a thread, so
that any number of event loops can wait for one reward, one after the other or at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from irlfast.data import DataError, TokenizedDemonstration
from irlfast.scorer import Score, TextScorer

from .samples import SampleReader

_Waiting = tuple[Any, "Future[float]"]


class SampleScorer:
    """A reward for slime's samples.

    Args:
        scorer: what judges.
        reader: makes its rows of samples.
        raw: give raw rewards, not those that a policy is served.

    Attributes:
        lock: held while a batch is judged; whoever changes the reward holds it too.
    """

    def __init__(self, scorer: TextScorer, reader: SampleReader, *, raw: bool = False) -> None:
        self.scorer, self.reader, self.raw = scorer, reader, raw
        self.lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="irlfast-slime-reward", daemon=True)
        self._thread.start()

    async def score(self, samples: Sequence[Any]) -> list[float]:
        """The rewards of samples, in their order.

        Raises:
            DataError: the first sample that cannot be judged. ArithmeticError: a reward that is not finite.
        """
        futures: list[Future[float]] = []
        for sample in samples:
            futures.append(Future())
            self._waiting.put((sample, futures[-1]))
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [float(answer) for answer in answers if not isinstance(answer, BaseException)]

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():  # this thread alone takes them out
                batch.append(self._waiting.get_nowait())
            self._answer([(sample, future) for sample, future in batch if future.set_running_or_notify_cancel()])

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        rows: list[TokenizedDemonstration] = []
        asked: list[Future[float]] = []
        for sample, future in batch:
            row = self._row(sample)
            if isinstance(row, DataError):
                future.set_exception(row)
            else:
                rows.append(row)
                asked.append(future)
        try:
            with self.lock:
                scores = self.scorer.score_tokenized(rows)
        except BaseException as error:  # whoever waits has to know, and the next batch may fare better
            for future in asked:
                future.set_exception(error)
            return
        for row, score, future in zip(rows, scores, asked, strict=True):
            self._settle(future, score, row.source)

    def _settle(self, future: Future[float], score: Score, source: str) -> None:
        try:
            future.set_result(score.served(raw=self.raw))
        except ArithmeticError as error:
            future.set_exception(ArithmeticError(f"{source}: {error}"))

    def _row(self, sample: Any) -> TokenizedDemonstration | DataError:
        try:
            return self.reader(sample)
        except DataError as error:
            return error
