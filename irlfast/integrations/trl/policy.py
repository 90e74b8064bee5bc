"""The trainer's policy as a reward function meets it: its completions as sequences, and their log-probs.

TRL tells a reward function no log-probs. Where an objective reads them they are computed in the call, under the policy
that has just sampled: `log_proposal` at the sampler's temperature, the others at temperature 1. A `rollout_func` that
knows its sampler's log-probs may give them as the column "sampler_logprobs", one list a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlfast.causal_lm import causal_lm_token_stats
from irlfast.losses import Objective
from irlfast.rewards.base import evaluating
from irlfast.rollout import Rollouts, Sequences

from .text import prompt_token_ids

# Fields of a RewardBatch that hold the policy's log-probs, and those that speak of demonstrations.
_OF_DEMONSTRATIONS = frozenset({"expert_logprobs", "expert_tokens"})
_OF_SAMPLES = frozenset({"sample_logprobs", "sample_tokens"})
_PLAIN = {"top_p": (1.0,), "top_k": (0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
_WITHOUT = "gail, contrastive, bradley_terry, max_margin"


class TrainerPolicy:
    """What is known of the policy in a trainer.

    Args:
        model: the policy.
        tokenizer: the trainer's processing_class.
        args: the trainer's configuration.
        objective: what the log-probs are for.
        micro_batch_size: sequences in one pass.

    Raises:
        TypeError: a processor of images in the place of a tokenizer.
        ValueError: a policy spread over processes whose log-probs the objective reads.
    """

    def __init__(self, model: Any, tokenizer: Any, args: Any, objective: Objective, *, micro_batch_size: int) -> None:
        if not hasattr(tokenizer, "eos_token_id"):
            raise TypeError(f"processing_class is a {type(tokenizer).__name__}; rewards judge text: give a tokenizer")
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self._needs = objective.needs
        self._name = type(objective).__name__
        self._size = micro_batch_size
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad
        reads = self._needs & (_OF_DEMONSTRATIONS | _OF_SAMPLES | {"log_proposal"})
        if reads and (getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)):
            raise ValueError(
                f"{self._name} reads log-probs of the policy, which FSDP or DeepSpeed spreads over processes: use an "
                f"objective without ({_WITHOUT})"
            )

    @property
    def device(self) -> torch.device:
        """Where the trainer's batches are, and so the reward."""
        return torch.device(self.args.device)

    @property
    def training(self) -> bool:
        """Whether the trainer trains or evaluates; it tells the two apart in the same way."""
        return bool(self.model.training)

    def samples(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], *, pooled: bool, given: Any = None
    ) -> Rollouts:
        """The completions, rows of one prompt in one group, with the log-probs that the objective reads in training.

        Args:
            prompts, completion_ids: as the trainer gives them.
            pooled: all in one group.
            given: the sampler's log-probs of each completion's tokens, where a rollout_func gave them.

        Raises:
            ValueError: the objective reads a density that is not known, or `given` does not fit.
        """
        prompt_ids = prompt_token_ids(prompts, self.tokenizer, getattr(self.args, "chat_template_kwargs", None))
        groups: dict[tuple[int, ...], int] = {}
        numbers = [0 if pooled else groups.setdefault(prompt, len(groups)) for prompt in prompt_ids]
        sequences = Sequences.from_token_lists(
            [list(prompt) for prompt in prompt_ids], [list(row) for row in completion_ids], self.pad_token_id, numbers
        ).to(self.device)
        zeros = torch.zeros(sequences.input_ids.shape, device=sequences.input_ids.device)
        sampler = model = zeros
        if self.training and self._needs & _OF_SAMPLES:
            model = self.logprobs(sequences)
        if self.training and "log_proposal" in self._needs:
            if given is not None:
                sampler = _laid_out(given, sequences)
            else:
                self._check_sampler()
                sampler = self.logprobs(sequences, float(self.args.temperature))
        return Rollouts(
            input_ids=sequences.input_ids,
            attention_mask=sequences.attention_mask,
            response_mask=sequences.response_mask,
            groups=sequences.groups,
            sampler_logprobs=sampler,
            model_logprobs=model,
            finish_reasons=tuple("stop" if row[-1] in self.eos_token_ids else "length" for row in completion_ids),
        )

    def of_demonstrations(self, experts: Sequences) -> Tensor | None:
        """log pi [B, S] of demonstrations under the policy that samples, where the objective reads it, else None.

        Raises:
            ValueError: the sampler is another distribution than the policy at temperature 1.
        """
        if not self._needs & _OF_DEMONSTRATIONS:
            return None
        self._check_sampler(float(self.args.temperature))
        return self.logprobs(experts)

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """log pi [B, S] of the responses' tokens under the policy as it is, dropout off; 0 elsewhere."""
        parts = (sequences.select(slice(low, low + self._size)) for low in range(0, len(sequences), self._size))
        with evaluating(self.model):
            found = [
                causal_lm_token_stats(
                    self.model,
                    part.input_ids,
                    attention_mask=part.attention_mask,
                    token_mask=part.response_mask,
                    temperature=temperature,
                ).logprob
                for part in parts
            ]
        return torch.cat(found).float()

    def _check_sampler(self, temperature: float = 1.0) -> None:
        """ValueError where the trainer samples in a way whose density is not known here."""
        names = [name for name, usual in _PLAIN.items() if getattr(self.args, name) not in usual]
        changed = [f"{name} = {getattr(self.args, name)}" for name in names]
        if getattr(self.args, "generation_kwargs", None):
            changed.append(f"generation_kwargs = {self.args.generation_kwargs}")
        if temperature != 1.0:
            changed.append(f"temperature = {temperature}")
        if changed:
            raise ValueError(
                f"{self._name} reads the density that completions were drawn from, which is not known with "
                f"{', '.join(changed)}: leave these at their defaults, use an objective without ({_WITHOUT}), or, "
                "for importance weights, let a rollout_func give the sampler's as the column 'sampler_logprobs'"
            )


def _laid_out(given: Sequence[Sequence[float]], sequences: Sequences) -> Tensor:
    """Lists of log-probs, one a completion, at the places [B, S] of their tokens."""
    laid = torch.zeros(sequences.input_ids.shape, device=sequences.input_ids.device)
    for row, (values, length) in enumerate(zip(given, sequences.response_lengths.tolist(), strict=True)):
        if len(values) != length:
            raise ValueError(f"sampler_logprobs[{row}] has {len(values)} entries for a completion of {length} tokens")
        laid[row, sequences.response_mask[row]] = torch.tensor(values, dtype=laid.dtype, device=laid.device)
    return laid
