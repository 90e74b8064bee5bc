"""The reward in service, the check of a new one, and the exchange of one for the other.

A new reward is loaded beside the old one, which goes on answering; has to be what its files say and give a finite
reward for a test row; and then takes the old one's place between two batches. Whatever goes wrong before that leaves
the old one where it is.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from irlfast.data import DataError, Demonstration

from .batcher import Judged
from .metrics import Metrics
from .served import LoadOptions, ServedReward, files_of, load, locate

_log = logging.getLogger(__name__)

_TEST_ROW = Demonstration(prompt="Once upon a time", response=" there was a test.", source="the test row")


class ReloadError(Exception):
    """A reward that was not put in service.

    Attributes:
        forbidden: it lies outside the folder that rewards may be loaded from.
    """

    def __init__(self, message: str, *, forbidden: bool = False) -> None:
        super().__init__(message)
        self.forbidden = forbidden


class LiveReward:
    """The reward in service. All but `judge` belongs to one event loop.

    Args:
        options: how rewards are loaded.
        served: the first one.
        executor: the thread that judges, where a new reward is tried.
        metrics: where reloads are counted.
    """

    def __init__(self, options: LoadOptions, served: ServedReward, executor: Executor, metrics: Metrics) -> None:
        self.options = options
        self.served = served
        self._executor = executor
        self._metrics = metrics
        self._one_at_a_time = asyncio.Lock()
        self._seen = served.files

    def judge(self, rows: Sequence[Demonstration], tokens: bool = False) -> Judged:
        """Score rows by the reward in service, one for all of them."""
        return self.served.judge(rows, tokens)

    async def reload(self, folder: Path | None = None) -> bool:
        """Put the reward in `folder` in service, or the newest of where the first came from; False: it is already.

        Args:
            folder: as LoadOptions.reward, absolute or seen from the root.

        Raises:
            ReloadError: it was not, and the one before still is; says why.
        """
        # The exchange goes on even if whoever asked for it has gone.
        outcome = await asyncio.shield(asyncio.ensure_future(self._reload(folder)))
        if isinstance(outcome, ReloadError):
            raise outcome
        return outcome

    async def watch(self, seconds: float) -> None:
        """Look for a newer reward every so many seconds, for ever. One that is refused is not tried again."""
        told = ""
        while True:
            await asyncio.sleep(seconds)
            try:
                files = await asyncio.to_thread(lambda: files_of(locate(self.options.reward)))
            except (OSError, ValueError) as error:
                # Between two saves a file may be absent for a moment; the next look tells.
                if str(error) != told:
                    told = str(error)
                    _log.warning("looking for a new reward: %s", error)
                continue
            if files != self._seen:
                self._seen = files
                await self._reload(None)

    async def _reload(self, folder: Path | None) -> bool | ReloadError:
        async with self._one_at_a_time:
            before = self.served
            try:
                path = self._allowed(folder)
                new = await asyncio.to_thread(load, self.options, path, beside=before)
                if new is before:
                    self._metrics.reloads["unchanged"] += 1
                    return False
                await asyncio.get_running_loop().run_in_executor(self._executor, _try, new)
            except Exception as error:
                self._metrics.reloads["refused"] += 1
                if not isinstance(error, ReloadError):
                    _log.warning("a new reward failed to load", exc_info=True)
                    error = ReloadError(f"{type(error).__name__}: {error}")
                _log.warning("%s stays in service: %s", before.version, error)
                return error
            self.served = new
            if folder is None:  # one that was asked for by name stays until there is a newer one
                self._seen = new.files
            self._metrics.reloads["loaded"] += 1
            _log.info("%s from %s is in service, after %s", new.version, new.folder, before.version)
            return True

    def _allowed(self, folder: Path | None) -> Path:
        if folder is None:
            return self.options.reward
        root = (self.options.root or self.options.reward).resolve()
        path = (root / folder).resolve()
        if path != root and root not in path.parents:
            raise ReloadError(
                f"{str(folder)!r} is not inside {root}, from where alone rewards are loaded", forbidden=True
            )
        return path


def _try(served: ServedReward) -> None:
    (score,) = served.judge([_TEST_ROW]).scores
    if isinstance(score, DataError):
        raise ReloadError(f"{served.folder} cannot judge a test row: {score}")
    if not math.isfinite(score.reward):
        raise ReloadError(f"{served.folder} gives a test row the reward {score.reward}: it has diverged")
