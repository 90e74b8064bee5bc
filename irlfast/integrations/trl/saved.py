"""A reward that was learned before, and stays as it is, as TRL's trainers call one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from irlfast.data import TokenizedDemonstration
from irlfast.scorer import RewardScorer

from .text import check_completions, prompt_token_ids


class SavedReward:
    """Judges completions by a saved reward: `reward_funcs=SavedReward("runs/first")`.

    It reads the completions' token ids, which have EOS where the policy sampled it, as in the reward's training. The
    reward's language model and the policy therefore share a tokenizer.

    Args:
        folder: a reward's folder, a checkpoint's, a run's, or the `irlfast_reward` in a TRL trainer's checkpoint.
        model: the language model that the reward reads, where it is no longer what is saved with it.
        device: where the reward and its language model run.
        batch_size: sequences in one pass.
        serve: "normalised" by the rewards of its training, or "raw".
        chat_template_kwargs: of the trainer, for chats.
        name: what the trainer's logs call it.

    Raises:
        FileNotFoundError, ValueError: as RewardScorer.from_pretrained.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        serve: Literal["normalised", "raw"] = "normalised",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        name: str = "irlfast_reward",
    ) -> None:
        if serve not in ("normalised", "raw"):
            raise ValueError(f"serve is {serve!r}; expected 'normalised' or 'raw'")
        self.__name__ = name
        self.serve = serve
        self.scorer = RewardScorer.from_pretrained(folder, model=model, device=device, batch_size=batch_size)
        self._template = chat_template_kwargs

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward for each completion, never None.

        Raises:
            ValueError: no ids, ids of another tokenizer than the reward's, or completions that are no answers in text.
        """
        ids = check_completions(prompts, completions, completion_ids)
        tokenizer = self.scorer.tokenizer
        for row, (completion, tokens) in enumerate(zip(completions, ids, strict=True)):
            said = completion if isinstance(completion, str) else completion[0]["content"].strip()
            decoded = tokenizer.decode(list(tokens), skip_special_tokens=True)
            if not (said == decoded if isinstance(completion, str) else said in decoded):
                raise ValueError(
                    f"completion {row} is {said!r}, and its ids are {decoded!r} to the reward's tokenizer: the policy "
                    "has another tokenizer than the reward"
                )
        rows = [
            TokenizedDemonstration(prompt_ids=prompt, response_ids=tuple(response), truncated=False)
            for prompt, response in zip(prompt_token_ids(prompts, tokenizer, self._template), ids, strict=True)
        ]
        scores = self.scorer.score_tokenized(rows)
        return [score.served(raw=self.serve == "raw") for score in scores]
