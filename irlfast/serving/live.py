"""The reward in service, the check of a new one, and the exchange of one for the other.

A new reward is loaded beside the old one, which goes on answering; has to be what its files say and give a finite
reward for a test row; and then takes the old one's place between two batches. Whatever goes wrong before that leaves
the old one where it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irlfast.data import DataError, Demonstration
from irlfast.iq_scorer import IQScorer, find_iq_checkpoint, load_scorer
from irlfast.scorer import RewardScorer, TextScorer, find_reward
from irlfast.train.checkpoint import MANIFEST, verify_checkpoint

from .batcher import Judged
from .metrics import Metrics

_log = logging.getLogger(__name__)

_TEST_ROW = Demonstration(prompt="Once upon a time", response=" there was a test.", source="the test row")

Files = tuple[tuple[str, int, int], ...]
"""Names, sizes and modification times (ns)."""


class ReloadError(Exception):
    """A reward that was not put in service.

    Attributes:
        forbidden: it lies outside the folder that rewards may be loaded from.
    """

    def __init__(self, message: str, *, forbidden: bool = False) -> None:
        super().__init__(message)
        self.forbidden = forbidden


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How rewards are loaded.

    Args:
        reward: a reward's folder, a checkpoint's or a run's, whose newest checkpoint is taken.
        root: rewards may be loaded from inside this folder alone; None is `reward`.
        model: as for `irlfast.iq_scorer.load_scorer`.
        device: where to run.
        batch_size: sequences in one pass.
        max_response_tokens: responses are cut here; None takes what the run says.
    """

    reward: Path
    root: Path | None = None
    model: str | None = None
    device: str = "cpu"
    batch_size: int = 32
    max_response_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedReward:
    """A reward ready to answer.

    Args:
        scorer: what judges.
        folder: where it was read.
        version: the checkpoint's step, where it has one, and the first 12 hexadecimal digits of its files' SHA-256.
        files: of the folder, as they were when it was read.
        loaded: seconds since the epoch.
    """

    scorer: TextScorer
    folder: Path
    version: str
    files: Files
    loaded: float

    def judge(self, rows: Sequence[Demonstration], tokens: bool = False) -> Judged:
        """Score rows as their sampler meant them: an empty response is one that ended at once."""
        spoken = [self._as_sampled(row) for row in rows]
        return Judged(self.scorer.score(spoken, tokens=tokens, empty_responses=True), self.version)

    def _as_sampled(self, row: Demonstration) -> Demonstration:
        tokenizer = self.scorer.tokenizer
        # Trainers decode with special tokens, and BOS must not stand there twice.
        bos = tokenizer.bos_token
        if bos and row.messages is None and row.prompt.startswith(bos):
            ids = tokenizer(row.prompt, verbose=False)["input_ids"]
            if ids[:2] == [tokenizer.bos_token_id] * 2:
                row = replace(row, prompt=row.prompt[len(bos) :])
        return row


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
                files = await asyncio.to_thread(lambda: _files(locate(self.options.reward)))
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
                if new.version == before.version:
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
            self.served, self._seen = new, new.files
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


def load(options: LoadOptions, path: Path | None = None, *, beside: ServedReward | None = None) -> ServedReward:
    """Load a reward, checked against its checkpoint's manifest where it has one.

    Args:
        options: how.
        path: where; None is `options.reward`.
        beside: the one in service, whose language model is shared where both read the same states.

    Raises:
        FileNotFoundError: no reward there. ValueError: damaged, or changed while it was read.
    """
    folder = locate(path or options.reward)
    step = folder.parent if folder.name == "reward" else folder
    if (step / MANIFEST).is_file():
        verify_checkpoint(step, under="policy/" if step == folder else "reward/")
    files = _files(folder)
    version = _version(folder, step.name, files)
    if beside is not None and version == beside.version:
        return beside
    scorer = load_scorer(
        folder,
        model=options.model,
        device=options.device,
        batch_size=options.batch_size,
        beside=None if beside is None else beside.scorer,
    )
    if _files(folder) != files:
        raise ValueError(f"{folder} changed while it was read: try again")
    cut = scorer.form.max_response_tokens if options.max_response_tokens is None else options.max_response_tokens
    scorer.form = replace(scorer.form, max_response_tokens=cut, max_tokens=_context(scorer))
    return ServedReward(scorer=scorer, folder=folder, version=version, files=files, loaded=time.time())


def locate(path: Path) -> Path:
    """The folder of a reward or of an IQ-trained checkpoint. FileNotFoundError: there is none."""
    return find_iq_checkpoint(path) or find_reward(path)


def kind(scorer: TextScorer) -> str:
    """The reward model's type, or "iq"."""
    return scorer.reward.model_type if isinstance(scorer, RewardScorer) else "iq"


def _try(served: ServedReward) -> None:
    (score,) = served.judge([_TEST_ROW]).scores
    if isinstance(score, DataError):
        raise ReloadError(f"{served.folder} cannot judge a test row: {score}")
    if not math.isfinite(score.reward):
        raise ReloadError(f"{served.folder} gives a test row the reward {score.reward}: it has diverged")


def _context(scorer: TextScorer) -> int | None:
    """Tokens that the language model or backbone takes; None where it does not say."""
    model: Any
    if isinstance(scorer, IQScorer):
        model, spare = scorer.reward.model, 1  # the state that has read the last token
    else:
        assert isinstance(scorer, RewardScorer)
        model, spare = scorer.language_model or getattr(scorer.reward, "backbone", None), 0
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions - spare if isinstance(positions, int) and positions > spare else None


def _paths(folder: Path) -> list[Path]:
    """What makes up the reward: its two files, or the policy of IQ-Learn."""
    if (folder / "state.json").is_file():
        return sorted(path for path in (folder / "policy").rglob("*") if path.is_file())
    return [folder / "config.json", folder / "model.safetensors"]


def _files(folder: Path) -> Files:
    stats = ((str(path), path.stat()) for path in _paths(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _version(folder: Path, step: str, files: Files) -> str:
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"{Path(name).relative_to(folder)} {size}\n".encode())
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    prefix = f"{step}-" if re.fullmatch(r"step-\d+", step) else ""
    return prefix + digest.hexdigest()[:12]
