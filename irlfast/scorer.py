"""A saved reward as a function of text: tokenised as its training data were, read by the same language model."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irlfast.data import DataError, Demonstration, TokenizedDemonstration, token_pieces, tokenize_demonstrations
from irlfast.rewards import BaseRewardModel, load_reward_model, reward_inputs
from irlfast.rewards.base import evaluating
from irlfast.rewards.reader import weights_digest
from irlfast.rollout import Sequences
from irlfast.train.checkpoint import latest_checkpoint


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a reward says of one response.

    Args:
        reward: raw. normalised: as a policy was served it, (reward - mean) / std of the rewards seen in training; None
            for a reward that served nobody (IQ-Learn's).
        tokens: the response's tokens as pieces of text that join to it; empty where they were not asked for.
        token_rewards, kind: see irlfast.rewards.TokenRewards; None where the model gives none.
        components: named parts of the reward, where it has any, and figures beside it.
        advantages: of the tokens, where the model has them (IQ-Learn's: log pi of the token).
    """

    reward: float
    normalised: float | None
    tokens: list[str] = field(default_factory=list)
    token_rewards: list[float] | None = None
    kind: str | None = None
    components: dict[str, float] = field(default_factory=dict)
    advantages: list[float] | None = None

    def served(self, *, raw: bool = False) -> float:
        """What a policy is rewarded with: normalised where the reward is, unless raw ones are asked for.

        Raises:
            ArithmeticError: it is not finite, and no policy should be trained on it.
        """
        number = self.reward if raw or self.normalised is None else self.normalised
        if not math.isfinite(number):
            raise ArithmeticError(f"the reward of a response is {number}: the reward model has diverged")
        return number

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain values, without those that are empty."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {})}


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How texts become tokens; as in training, or the reward judges what it has not seen.

    Args:
        prompt_tokens: how many tokens of a plain text are its prompt.
        max_response_tokens: responses are cut here, and then have no EOS; None cuts none.
        max_tokens: rows with more tokens, prompt and response together, are refused; None refuses none.
    """

    prompt_tokens: int = 32
    max_response_tokens: int | None = None
    max_tokens: int | None = None


class TextScorer(ABC):
    """Scores texts: tokenised one by one, judged in batches of like length.

    Args:
        tokenizer: a transformers tokenizer.
        form: how texts become tokens.
        batch_size: sequences in one pass.
    """

    def __init__(self, tokenizer: Any, *, form: TextForm | None = None, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tokenizer = tokenizer
        self.form = form or TextForm()
        self.batch_size = batch_size

    def _tokenize(self, row: Demonstration, empty_responses: bool) -> TokenizedDemonstration | DataError:
        """One row as in training, or why it cannot be judged."""
        longest = self.form.max_response_tokens
        try:
            tokenized = tokenize_demonstrations(
                [row],
                self.tokenizer,
                max_response_tokens=sys.maxsize if longest is None else longest,
                prompt_tokens=self.form.prompt_tokens,
            )[0]
        except DataError as error:
            if not empty_responses or row.is_text:
                return error
        else:
            count, limit = len(tokenized.prompt_ids) + len(tokenized.response_ids), self.form.max_tokens
            if limit is not None and count > limit:
                return DataError(f"{row.source}: {count} tokens, expected at most {limit}: give a shorter text")
            return tokenized
        # The prompt's tokens do not depend on what follows it; where they are what is wrong, they still are.
        filled = self._tokenize(replace(row, response="."), False)
        if isinstance(filled, DataError):
            return filled
        return replace(filled, response_ids=(self.tokenizer.eos_token_id,), truncated=False)

    def score(
        self, rows: Sequence[Demonstration], *, tokens: bool = False, empty_responses: bool = False
    ) -> list[Score | DataError]:
        """Score rows in their order.

        Args:
            rows: pairs, chats or plain texts.
            tokens: also give each response's tokens, and their rewards where the model has any.
            empty_responses: judge an empty response as EOS alone, which is what a sampler that says nothing says.

        Returns:
            A Score for each row, or the DataError that says why it cannot be judged.
        """
        tokenized = [self._tokenize(row, empty_responses) for row in rows]
        scores = iter(self.score_tokenized([row for row in tokenized if not isinstance(row, DataError)], tokens=tokens))
        return [row if isinstance(row, DataError) else next(scores) for row in tokenized]

    def score_tokenized(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> list[Score]:
        """Score rows that are token ids already, in their order; `tokens` as in `score`."""
        # Rows of like length share a batch: less padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].response_ids))
        scores: dict[int, Score] = {}
        for low in range(0, len(order), self.batch_size):
            part = order[low : low + self.batch_size]
            answers = self.score_tokens([rows[i] for i in part], tokens=tokens)
            scores.update(zip(part, answers, strict=True))
        return [scores[i] for i in range(len(rows))]

    @abstractmethod
    def score_tokens(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> Iterator[Score]:
        """Score tokenised rows in one pass."""

    def _batch(self, rows: Sequence[TokenizedDemonstration], device: torch.device) -> Sequences:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        prompts, responses = [list(row.prompt_ids) for row in rows], [list(row.response_ids) for row in rows]
        return Sequences.from_token_lists(prompts, responses, pad or 0).to(device)


class RewardScorer(TextScorer):
    """Scores texts by a reward model.

    Args:
        reward: any model of irlfast.rewards.
        tokenizer: a transformers tokenizer, of the language model below or of the reward's backbone.
        language_model: whose hidden states the reward reads; None for a reward that reads tokens.
        form: how texts become tokens.
        batch_size: sequences in one pass.

    Raises:
        ValueError: a reward on hidden states without a language model, or with another than it was trained on.
    """

    def __init__(
        self,
        reward: BaseRewardModel,
        tokenizer: Any,
        language_model: nn.Module | None = None,
        *,
        form: TextForm | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(tokenizer, form=form, batch_size=batch_size)
        if reward.reads == "hidden_states":
            if language_model is None or reward.source is None:
                raise ValueError(
                    "the reward reads hidden states and does not say whose: give the language model it was trained on"
                )
            trained_on, given = reward.source.weights, weights_digest(language_model)
            if trained_on and given != trained_on:
                raise ValueError(
                    f"the reward was trained on hidden states of {reward.source.model or 'a model'} with weights "
                    f"{trained_on}; the language model given has weights {given}: its states mean something else. "
                    "Give the model that the run started from"
                )
        self.reward = reward.eval()
        self.language_model = language_model

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        model: str | None = None,
        device: str = "cpu",
        form: TextForm | None = None,
        batch_size: int = 32,
        beside: TextScorer | None = None,
    ) -> RewardScorer:
        """Load a reward and what it reads.

        Args:
            directory: the reward's folder, a checkpoint's, or a run's (whose newest checkpoint is taken).
            model: folder or hub name of the language model or of the backbone; None takes what is saved with the
                reward.
            device: where to run.
            form: None takes what the run's own files say, where the reward lies in one.
            batch_size: sequences in one pass.
            beside: a scorer loaded with the same `model` and `device`, whose language model is used again where this
                reward was trained on the same states.

        Raises:
            FileNotFoundError: no reward there. ValueError: it does not say what it reads, and `model` is None.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = find_reward(Path(directory))
        reward = load_reward_model(folder, backbone=model).to(device)
        form = form or trained_form(folder)
        # Without a digest of its weights, the same name may stand for another model by now.
        if isinstance(beside, RewardScorer) and beside.language_model is not None and reward.reads == "hidden_states":
            source = reward.source
            if source is not None and source.weights and source == beside.reward.source:
                return cls(reward, beside.tokenizer, beside.language_model, form=form, batch_size=batch_size)
        if reward.reads == "tokens":
            name, language_model = model or reward.config.model, None
        else:
            name = model or ("" if reward.source is None else reward.source.model)
            if not name:
                raise ValueError(
                    f"{folder} does not say whose hidden states it reads: give the language model with --model"
                )
            loaded: Any = AutoModelForCausalLM.from_pretrained(name)
            language_model = loaded.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(reward, tokenizer, language_model, form=form, batch_size=batch_size)

    def score_tokens(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> Iterator[Score]:
        """Score tokenised rows in one pass."""
        batch = self._batch(rows, next(self.reward.parameters()).device)
        with torch.no_grad(), evaluating(self.reward):
            inputs = reward_inputs(
                self.reward, self.language_model, batch.input_ids, batch.attention_mask, batch.response_mask
            )
            rewards = self.reward(*inputs)
            components = self.reward.components(*inputs)
            given = self.reward.token_rewards(*inputs) if tokens and self.reward.has_token_rewards else None
        normalised = self.reward.normalizer.normalize(rewards)
        for index, row in enumerate(rows):
            mask = batch.response_mask[index]
            yield Score(
                reward=float(rewards[index]),
                normalised=float(normalised[index]),
                # Decoded together: some tokenizers drop the space in front of a text's first token.
                tokens=token_pieces([*row.prompt_ids, *row.response_ids], self.tokenizer)[len(row.prompt_ids) :]
                if tokens
                else [],
                token_rewards=None if given is None else given.values[index][mask].tolist(),
                kind=None if given is None else given.kind,
                components={name: float(values[index]) for name, values in components.items()},
            )


def find_reward(folder: Path) -> Path:
    """The reward's folder in a reward's, a checkpoint's or a run's folder.

    Raises:
        FileNotFoundError: none of these.
    """
    for candidate in (folder, folder / "reward"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        newest = latest_checkpoint(folder / "checkpoints")
        if newest is not None:
            return find_reward(newest)
    raise FileNotFoundError(
        f"no reward in {folder}: give a folder that save_pretrained wrote, a checkpoint (step-N), or a run's folder"
    )


def trained_form(reward: Path) -> TextForm:
    """How the run that `reward` lies in (RUN/checkpoints/step-N/reward) made tokens of texts; the default elsewhere."""
    run = reward.parent.parent.parent
    if reward.name != "reward" or not (run / "config.json").is_file():
        return TextForm()
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return TextForm(
        prompt_tokens=config.get("data", {}).get("prompt_tokens", TextForm.prompt_tokens),
        max_response_tokens=config.get("train", {}).get("rollout", {}).get("max_new_tokens"),
    )
