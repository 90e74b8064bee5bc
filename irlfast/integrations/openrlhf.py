"""A saved reward as OpenRLHF calls one, written against OpenRLHF 0.11.0.

    IRLFAST_REWARD=runs/first python -m openrlhf.cli.train_ppo_ray --reward.remote_url FILE ...

FILE is this file (`python -c "import irlfast.integrations.openrlhf as m; print(m.__file__)"`), or one of your own:

    from irlfast.integrations.openrlhf import RewardFunction

    reward_func = RewardFunction("runs/first", device="cuda")

Older versions call the option --remote_rm_url. OpenRLHF loads FILE outside any package and calls its
`reward_func(queries, prompts, labels)` in threads, for one sample at a time. A query is the prompt's and the response's
tokens decoded together, special tokens included: it ends with EOS where the policy sampled it, has no padding, and no
BOS but one that the prompt spells out. It logs an exception as a note and goes on without that sample's reward, so
errors are logged here as errors.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from irlfast.data import TokenizedDemonstration
from irlfast.data.tokenize import with_leading_special_tokens
from irlfast.scorer import RewardScorer

VARIABLE = "IRLFAST_REWARD"
_log = logging.getLogger(__name__)


class RewardFunction:
    """Judges what a policy with the reward's tokenizer wrote; may be called from several threads.

    Args:
        folder: a reward's folder, a checkpoint's or a run's.
        model: the language model that the reward reads, where it is no longer what is saved with it.
        device: where both run.
        batch_size: sequences in one pass.

    Raises:
        FileNotFoundError, ValueError: as RewardScorer.from_pretrained.
    """

    def __init__(
        self, folder: str | Path, *, model: str | None = None, device: str = "cpu", batch_size: int = 32
    ) -> None:
        self.scorer = RewardScorer.from_pretrained(folder, model=model, device=device, batch_size=batch_size)
        self._one_at_a_time = threading.Lock()  # a fast tokenizer refuses to be used by two threads

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Rewards of N queries.

        Args:
            queries: [N] prompt and response, as above.
            prompts: [N] prompts alone, chat templates applied.
            labels: not read.

        Returns:
            rewards: [N] float32, normalised by the rewards of its training.
            scores: [N], the same through a sigmoid, in (0, 1) as dynamic filtering expects.
            extra_logs: {"raw_reward": [N]}.

        Raises:
            ValueError: a query that does not begin with its prompt, or has nothing after it.
            ArithmeticError: a reward that is not finite.
        """
        try:
            with self._one_at_a_time:
                rows = [self._tokenize(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
                scores = self.scorer.score_tokenized(rows)
            rewards = torch.tensor([score.served() for score in scores])
        except Exception:
            _log.exception("no reward for %d samples", len(queries))
            raise
        raw = torch.tensor([score.reward for score in scores])
        return {"rewards": rewards, "scores": rewards.sigmoid(), "extra_logs": {"raw_reward": raw}}

    def _tokenize(self, query: str, prompt: str) -> TokenizedDemonstration:
        """The tokens that were sampled, after a prompt that begins as those of the reward's training did."""
        tokenizer = self.scorer.tokenizer
        before, ids = with_leading_special_tokens(prompt, tokenizer)
        said = tokenizer.decode(ids, skip_special_tokens=False)
        if not query.startswith(said):
            raise ValueError(
                f"the query {query[:80]!r} does not begin with its prompt {said[:80]!r}: either the policy has another "
                "tokenizer than the reward, or OpenRLHF cut the front of a prompt that is too long for its max_len"
            )
        joint = tokenizer(query, add_special_tokens=False)["input_ids"]
        if joint[: len(ids)] == ids:
            response = joint[len(ids) :]
        else:  # tokens that the policy sampled one by one may be written as others
            response = tokenizer(query[len(said) :], add_special_tokens=False)["input_ids"]
        if not response:
            raise ValueError(f"the query {query[:80]!r} has no response after its prompt")
        if ids[: len(before)] == before:  # a chat template spells it out
            before = []
        return TokenizedDemonstration(prompt_ids=(*before, *ids), response_ids=tuple(response), truncated=False)


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **options: Any
) -> dict[str, Any]:
    """`RewardFunction` of the reward that the environment variable IRLFAST_REWARD names, loaded once, on the CPU.

    Raises:
        KeyError: the variable is not set.
    """
    return _named()(queries, prompts, labels, **options)


_loading = threading.Lock()


def _named() -> RewardFunction:
    with _loading:
        return _load()


@cache
def _load() -> RewardFunction:
    folder = os.environ.get(VARIABLE)
    if not folder:
        message = f"the environment variable {VARIABLE} is not set: let it name the folder of a reward or of a run"
        _log.error(message)
        raise KeyError(message)
    return RewardFunction(folder)
