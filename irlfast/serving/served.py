"""A reward ready to answer: found, held against its manifest, loaded, and named by what its files hold."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irlfast.data import Demonstration
from irlfast.iq_scorer import IQScorer, find_iq_checkpoint, load_scorer
from irlfast.scorer import RewardScorer, TextScorer, find_reward
from irlfast.train.checkpoint import MANIFEST, verify_checkpoint

from .batcher import Judged

_TRIES = 5
_log = logging.getLogger(__name__)

Files = tuple[tuple[str, int, int], ...]
"""Names, sizes and modification times (ns)."""


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


def load(options: LoadOptions, path: Path | None = None, *, beside: ServedReward | None = None) -> ServedReward:
    """Load a reward, checked against its checkpoint's manifest where it has one.

    Args:
        options: how.
        path: where; None is `options.reward`.
        beside: the one in service, whose language model is shared where both read the same states.

    Raises:
        FileNotFoundError: no reward there. ValueError: damaged, or changed while it was read.

    Returns:
        The reward, or `beside` where that is the one that lies there.
    """
    path = path or options.reward
    for _ in range(_TRIES - 1):
        folder = locate(path).resolve()
        try:
            return _load(options, folder, beside)
        except (OSError, ValueError) as error:
            # A run that goes on drops its older checkpoints, also one that is just being read.
            newer = locate(path).resolve()
            if newer == folder:
                raise
            _log.info("%s could not be read (%s), %s is newer", folder, error, newer)
    return _load(options, locate(path).resolve(), beside)


def _load(options: LoadOptions, folder: Path, beside: ServedReward | None) -> ServedReward:
    step = folder.parent if folder.name == "reward" else folder
    if (step / MANIFEST).is_file():
        verify_checkpoint(step, under="policy/" if step == folder else "reward/")
    files = files_of(folder)
    version = _version(folder, step.name, files)
    if beside is not None and (version, folder) == (beside.version, beside.folder):
        return beside
    scorer = load_scorer(
        folder,
        model=options.model,
        device=options.device,
        batch_size=options.batch_size,
        beside=None if beside is None else beside.scorer,
    )
    if files_of(folder) != files:
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
    """What makes up the reward: its two files, or the policy of IQ-Learn and its options."""
    if (folder / "state.json").is_file():
        policy = sorted(path for path in (folder / "policy").rglob("*") if path.is_file())
        return [folder / "state.json", *policy]
    return [folder / "config.json", folder / "model.safetensors"]


def files_of(folder: Path) -> Files:
    """Changes where any of a reward's files does."""
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
