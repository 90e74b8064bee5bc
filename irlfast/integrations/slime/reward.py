"""A learned reward as slime's reward function, loaded once in the process that rolls out.

Where it is and how it runs is said by these attributes of slime's args, which the YAML file of --custom-config-path
can hold, or by environment variables of the same names in capitals:

    irlfast_reward              folder of a reward, a checkpoint or a run (`irlfast bilevel`, `irlfast iq`)
    irlfast_reward_model        the language model that it reads, where the folder does not say or it has moved
    irlfast_reward_device       where it runs, by default "cpu"
    irlfast_reward_batch_size   sequences in one pass, by default 32
    irlfast_reward_raw          true for raw rewards; else as a policy is served them, normalised where they are

Without `irlfast_reward` and with `irl_demonstrations` it is the reward that learns as slime trains (`online`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irlfast.iq_scorer import load_scorer
from irlfast.scorer import TextScorer

from .samples import SampleReader, flat, same_tokenizer, status
from .scoring import SampleScorer

_FINISHED = ("completed", "truncated", "failed")


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Which reward, and how it runs.

    Args:
        path, model, device, batch_size, raw: see the module's description; path is "" for a reward that learns.
        policy: slime's --hf-checkpoint, whose tokenizer made the samples' tokens.
        rendered: slime's --apply-chat-template.
    """

    path: str = ""
    model: str | None = None
    device: str = "cpu"
    batch_size: int = 32
    raw: bool = False
    policy: str | None = None
    rendered: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"irlfast_reward_batch_size must be at least 1, got {self.batch_size}")
        if self.path.startswith(("http://", "https://")):
            raise ValueError(
                f"irlfast_reward is {self.path!r}: a server is asked by slime itself, with --rm-type remote_rm "
                f"--rm-url {self.path} and without --custom-rm-path"
            )

    @classmethod
    def of(cls, args: Any) -> RewardSettings:
        """As slime was launched. ValueError: a setting that is out of its range."""
        return cls(
            path=str(setting(args, "irlfast_reward", "")),
            model=setting(args, "irlfast_reward_model"),
            device=str(setting(args, "irlfast_reward_device", "cpu")),
            batch_size=int(setting(args, "irlfast_reward_batch_size", 32)),
            raw=is_true(setting(args, "irlfast_reward_raw", False)),
            policy=getattr(args, "hf_checkpoint", None),
            rendered=bool(getattr(args, "apply_chat_template", False)),
        )


def setting(args: Any, name: str, default: Any = None) -> Any:
    """An attribute of args, or else the environment variable of its name in capitals, or else the default."""
    value = getattr(args, name, None)
    return os.environ.get(name.upper(), default) if value is None else value


def is_true(value: Any) -> bool:
    """Whether a setting is on; environment variables are text."""
    return str(value).lower() in ("1", "true", "yes")


async def reward(args: Any, sample: Any, **kwargs: Any) -> Any:
    """--custom-rm-path irlfast.integrations.slime.reward: the reward of a Sample, or of each of a list of them.

    The model runs on a thread of its own; samples that are asked for while it is busy are judged in one batch. An
    aborted sample is not finished and has no reward yet: None, which is what slime keeps for it. How responses that
    are empty or were cut off are judged, see `samples`.

    Args:
        args: slime's.
        sample: a Sample, or a list of them.
        kwargs: whatever else slime passes.

    Returns:
        A float, or a list of floats in the samples' order; None for an aborted sample.

    Raises:
        ValueError: no reward is named. FileNotFoundError: none is there. DataError: a sample that cannot be judged.
    """
    samples: list[Any] = list(sample) if isinstance(sample, (list, tuple)) else [sample]
    judged = [one for one in samples if status(one) != "aborted"]
    scorer = await asyncio.to_thread(_scorer_of, args)
    rewards = iter(await scorer.score(judged))
    answers = [None if status(one) == "aborted" else next(rewards) for one in samples]
    return answers if isinstance(sample, (list, tuple)) else answers[0]


async def group_reward(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[Any]:
    """--group-rm --custom-rm-path irlfast.integrations.slime.group_reward: the rewards of a group at once."""
    answers: list[Any] = await reward(args, list(samples), **kwargs)
    return answers


async def rescore(args: Any, samples: Any) -> int:
    """Renew stale rewards, after the reward has changed, of samples that wait in a buffer.

    slime does not score a sample again that has a reward, and refuses a finished one that has none. So finished samples
    are scored here, and unfinished ones lose their reward, to be scored when they are finished.

    Args:
        args: slime's.
        samples: a Sample, or lists of them, nested as slime's buffers are. Those without a reward are left alone.

    Returns:
        How many rewards were renewed or taken away.
    """
    stale = [sample for sample in flat(samples) if sample.reward is not None]
    finished = [sample for sample in stale if status(sample) in _FINISHED]
    renewed = dict(zip(map(id, finished), await reward(args, finished), strict=True)) if finished else {}
    for sample in stale:
        sample.reward = renewed.get(id(sample))
    return len(stale)


def reload_reward(args: Any) -> None:
    """Forget the reward that was loaded, so that the next sample is judged by what now is in its folder."""
    with _loading:
        _loaded.pop(RewardSettings.of(args), None)


# slime names functions by their paths, so what they share lies in this module.
_loading = threading.Lock()
_loaded: dict[RewardSettings, SampleScorer] = {}


def _scorer_of(args: Any) -> SampleScorer:
    settings = RewardSettings.of(args)
    if not settings.path:
        from .online import online_reward

        return online_reward(args).scorer
    with _loading:
        if settings not in _loaded:
            scorer = load_scorer(
                settings.path, model=settings.model, device=settings.device, batch_size=settings.batch_size
            )
            _loaded[settings] = SampleScorer(scorer, reader_for(scorer, settings), raw=settings.raw)
        return _loaded[settings]


def reader_for(scorer: TextScorer, settings: RewardSettings) -> SampleReader:
    """Reads the samples of the policy that slime trains for `scorer`."""
    same = False
    if settings.policy is not None:
        from transformers import AutoTokenizer

        same = same_tokenizer(AutoTokenizer.from_pretrained(settings.policy), scorer.tokenizer)
    return SampleReader(scorer.tokenizer, scorer.form, same_tokens=same, rendered=settings.rendered)
