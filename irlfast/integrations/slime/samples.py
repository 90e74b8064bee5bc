"""slime's Sample as the tokens that a reward judges, in the form that it was trained on.

Where policy and reward have the same tokenizer, a sample's own tokens are judged: what was sampled, with the EOS that
was sampled. Elsewhere, and for samples without tokens of a prompt, the texts are tokenised anew. Either way a response
that ended by itself ends with EOS and one that was cut off (Status.TRUNCATED) does not, as in training; one without a
single token is judged as EOS alone, which is what a sampler that says nothing says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from irlfast.data import DataError, Demonstration, Message, TokenizedDemonstration, tokenize_demonstrations
from irlfast.scorer import TextForm


def status(sample: Any) -> str:
    """The name of a sample's status: "pending", "completed", "truncated", "aborted" or "failed"."""
    return str(getattr(sample.status, "value", sample.status))


def flat(samples: Any) -> Iterator[Any]:
    """The samples of one, a list, or lists of lists (slime's groups, and what fans out of one rollout)."""
    if isinstance(samples, Iterable):
        for sample in samples:
            yield from flat(sample)
    else:
        yield samples


class SampleReader:
    """Makes a reward's rows of slime's samples.

    Args:
        tokenizer: the reward's.
        form: as the reward was trained.
        same_tokens: whether samples' token ids are this tokenizer's.
        rendered: whether prompts are chats that slime has rendered already (--apply-chat-template), special tokens
            included.
    """

    def __init__(self, tokenizer: Any, form: TextForm, *, same_tokens: bool, rendered: bool) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.same_tokens, self.rendered = same_tokens, rendered
        plain = tokenizer("a", verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        self._bos: tuple[int, ...] = (bos,) if not rendered and bos is not None and plain[:1] == [bos] else ()

    def __call__(self, sample: Any) -> TokenizedDemonstration:
        """One sample. DataError: it has no prompt to judge it by; the message names the sample."""
        length = sample.response_length
        if self.same_tokens and len(sample.tokens) > length:
            split = len(sample.tokens) - length
            prompt, response = tuple(sample.tokens[:split]), list(sample.tokens[split:])
            if self._bos and prompt[:1] != self._bos:
                prompt = self._bos + prompt
            return self._end(prompt, response, sample)
        return self._from_text(sample)

    def _end(self, prompt: tuple[int, ...], response: list[int], sample: Any) -> TokenizedDemonstration:
        eos = self.tokenizer.eos_token_id
        limit = self.form.max_response_tokens or sys.maxsize
        ended = eos in response or status(sample) != "truncated"
        if eos in response:
            response = response[: response.index(eos)]
        if ended or not response:
            response = [*response, eos]
        truncated = not ended or len(response) > limit
        return TokenizedDemonstration(
            prompt_ids=prompt, response_ids=tuple(response[:limit]), truncated=truncated, source=_name(sample)
        )

    def _from_text(self, sample: Any) -> TokenizedDemonstration:
        # Both texts are tokenised together, since what follows a prompt may begin with another token on its own.
        said = sample.response if sample.response.strip() else "."
        row = Demonstration(**_prompt(sample), response=said, source=_name(sample))
        (found,) = tokenize_demonstrations(
            [row], self.tokenizer, max_response_tokens=sys.maxsize, prompt_tokens=self.form.prompt_tokens, add_eos=False
        )
        prompt = found.prompt_ids
        if self.rendered and isinstance(sample.prompt, str):
            prompt = tuple(self.tokenizer(sample.prompt, add_special_tokens=False, verbose=False)["input_ids"])
        return self._end(prompt, list(found.response_ids) if sample.response.strip() else [], sample)


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether the same ids are the same tokens in both."""
    return bool(first.eos_token_id == second.eos_token_id and first.get_vocab() == second.get_vocab())


def _name(sample: Any) -> str:
    return f"sample {sample.index}" if sample.index is not None else "a sample"


def _prompt(sample: Any) -> dict[str, Any]:
    """The prompt of a Demonstration."""
    if isinstance(sample.prompt, str):
        return {"prompt": sample.prompt}
    turns = []
    for number, turn in enumerate(sample.prompt):
        if not (isinstance(turn, Mapping) and isinstance(turn.get("content"), str)):
            raise DataError(
                f"{_name(sample)}: turn {number} of its prompt is {turn!r}; expected a role and a content that is text"
            )
        turns.append(Message(role=str(turn.get("role")), content=turn["content"]))
    return {"prompt": "", "messages": tuple(turns)}
