"""Sample from a transformers causal language model, or any causal module of its shape, in this process.

The loop is written out rather than left to `model.generate`: it keeps the log-prob of every token under the sampler
exactly as it sampled, draws from a generator of its own, and costs little Python per token, which small models feel.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.causal_lm import taken, unwrap

from .base import Rollouts, SamplingParams, Sequences
from .modules import device_of, eval_mode, load_weights
from .sampling import sample_tokens
from .trace import Trace


class TransformersEngine:
    """Batched sampling with a key-value cache.

    The engine shares the module: what an optimiser does to it is seen by the next `generate`. Dropout is off while
    sampling, and every submodule gets its mode back. Nothing is tracked for autograd; the tensors returned are ordinary
    ones that autograd may use.

    With a seed, a row's random numbers depend on the seed, the row's index and max_new_tokens alone, not on which other
    rows are in the batch or when those end. Its logits may still differ in the last bits with the size of the batch, as
    matrix products do.

    Args:
        model: called as model(input_ids=, attention_mask=, position_ids=, cache=, use_cache=), as far as its `forward`
            has these parameters, and returns logits [B, S, V] or an object with `.logits`. The cache is called
            `past_key_values` where the forward does not have `cache` (transformers before 5.24). Without one in its
            output the whole prefix is run again for every token: right, but slow.
        eos_token_id: the id, or the ids, that end a response.
        pad_token_id: fills the right of shorter rows; may be equal to an EOS id, since the masks tell them apart.
        device: where the module is; by default the device of its first parameter. The module is never moved.
        dtype: run the module under torch.autocast with this dtype; None runs it as it is.
        max_batch_size: most rows sampled at once; None is all.

    Raises:
        ValueError: a token id outside the vocabulary, an encoder-decoder model, or a device the module is not on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder model; a causal language model is needed")
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocab_size: int | None = getattr(text_config, "vocab_size", None)
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.device = device_of(model, device)
        self.dtype = dtype
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, or None for no limit, got {max_batch_size}")
        self.max_batch_size = max_batch_size
        if eos_token_id is None:  # what a tokenizer without EOS says
            raise ValueError("eos_token_id is None: give the id, or the ids, that end a response")
        self.eos_token_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        if not self.eos_token_ids:
            raise ValueError("eos_token_id is empty: give at least one id")
        self.pad_token_id = pad_token_id
        for name, token in (*(("eos_token_id", t) for t in self.eos_token_ids), ("pad_token_id", pad_token_id)):
            if token is None or not self._in_vocabulary(token):
                raise ValueError(f"{name} = {token} is outside the vocabulary [0, {self.vocab_size})")
        self.version = 0
        self._model: nn.Module | None = model
        self._eos = torch.tensor(self.eos_token_ids, device=self.device)
        parameters = inspect.signature(model.forward).parameters
        self._accepted = frozenset(parameters)
        self._accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # A wrapper (PEFT) has neither name in its signature and passes on what it is given.
        named = inspect.signature(unwrap(model).forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._use_cache = self._accepts(self._cache_name) and self._accepts("use_cache")

    @property
    def model(self) -> nn.Module:
        """The module sampled from."""
        if self._model is None:
            raise RuntimeError("this engine was closed; make a new one")
        return self._model

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, return_hidden_states: bool = False
    ) -> Rollouts:
        """Sample `params.n` responses to each prompt.

        Args:
            prompts: token ids, at least one prompt, each with at least one token.
            params: see SamplingParams. The global random state is neither read nor changed.
            return_hidden_states: also give the last layer's states at every token (one pass over the finished rows).

        Returns:
            Rollouts on the engine's device; row i answers prompt i // n, EOS is the last token of a row that ended.

        Raises:
            ValueError: no prompt, an empty prompt, a token outside the vocabulary, or more than the model's context.
            FloatingPointError: the model gave NaN logits.
            RuntimeError: the engine was closed.
        """
        model = self.model
        token_lists = [list(prompt) for prompt in prompts]
        self._check_prompts(token_lists, params.max_new_tokens)
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        rows = len(token_lists) * params.n
        uniforms = torch.rand(rows, params.max_new_tokens, dtype=torch.float64, generator=generator).to(self.device)
        batch = self.max_batch_size or rows
        with eval_mode(model), self._autocast():
            parts = [
                self._sample_rows(token_lists, range(low, min(low + batch, rows)), params, uniforms)
                for low in range(0, rows, batch)
            ]
        rollouts = parts[0] if len(parts) == 1 else Rollouts.concat(parts, self.pad_token_id)
        if not bool(rollouts.model_logprobs.isfinite().all()):
            row = int((~rollouts.model_logprobs.isfinite()).any(1).nonzero()[0])
            raise FloatingPointError(
                f"the model gave NaN logits for row {row} (prompt {row // params.n}): check its weights"
            )
        if return_hidden_states:
            return replace(rollouts, hidden_states=self.hidden_states(rollouts))
        return rollouts

    @torch.no_grad()
    def hidden_states(self, sequences: Sequences) -> Tensor:
        """The last layer's states after the final norm, [B, S, H], at every token of `sequences`; 0 on padding.

        Use it for demonstrations, so that they and the rollouts are looked at in the same way.

        Raises:
            ValueError: no sequences.
            TypeError: the model gives no hidden states.
        """
        model = self.model
        if len(sequences) == 0:
            raise ValueError("sequences is empty: give at least one row")
        if sequences.input_ids.device != self.device:
            sequences = sequences.to(self.device)
        size = self.max_batch_size or len(sequences)
        with eval_mode(model), self._autocast():
            parts = [
                self._hidden(sequences.input_ids[low : low + size], sequences.attention_mask[low : low + size])
                for low in range(0, len(sequences), size)
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def update_weights(self, state_dict: Mapping[str, Tensor] | None, version: int) -> None:
        """Set `version`, and load `state_dict`, or nothing if it is None: right where the policy is this very module.

        Raises:
            ValueError: names or shapes that do not fit the model; then nothing was changed.
        """
        if state_dict is not None:
            load_weights(self.model, state_dict)
        self.version = version

    def close(self) -> None:
        """Let go of the module."""
        self._model = None

    def _accepts(self, name: str) -> bool:
        return self._accepts_any or name in self._accepted

    def _in_vocabulary(self, token: int) -> bool:
        return token >= 0 and (self.vocab_size is None or token < self.vocab_size)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def _check_prompts(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        if not prompts:
            raise ValueError("prompts is empty: give at least one prompt")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompts[{i}] is empty: a prompt needs at least one token, e.g. the BOS id")
            for position, token in enumerate(prompt):
                if not self._in_vocabulary(token):
                    raise ValueError(
                        f"prompts[{i}][{position}] = {token} is outside the vocabulary [0, {self.vocab_size})"
                    )
            if self.max_length is not None and len(prompt) + max_new_tokens > self.max_length:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens = {max_new_tokens} that exceeds the "
                    f"model's context of {self.max_length}: shorten the prompt or lower max_new_tokens"
                )

    def _forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        accepted = {name: value for name, value in inputs.items() if value is not None and self._accepts(name)}
        return self.model(input_ids=input_ids, **accepted)

    def _sample_rows(self, prompts: list[list[int]], rows: range, params: SamplingParams, uniforms: Tensor) -> Rollouts:
        """Sample the given rows of the whole result."""
        first = rows[0] // params.n
        chunk = prompts[first : rows[-1] // params.n + 1]
        source = torch.tensor([row // params.n - first for row in rows], device=self.device)
        uniforms = uniforms[rows[0] : rows[-1] + 1]
        sampled = self._decode_cached(chunk, source, uniforms, params) if self._use_cache else None
        if sampled is None:
            sampled = self._decode_uncached(chunk, source, uniforms, params)
        return self._lay_out([prompts[row // params.n] for row in rows], rows, params, *sampled)

    def _decode_cached(
        self, prompts: list[list[int]], source: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Tokens, sampler and model log-probs [B, T]; None where the model has no cache to take rows of."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max())
        # Left-padded, so that the last column is every prompt's last token.
        ids = torch.tensor([[self.pad_token_id] * (width - len(p)) + p for p in prompts], device=self.device)
        real = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        ragged = not bool(real.all())
        output = self._forward(
            ids,
            attention_mask=real.long() if ragged else None,
            position_ids=(real.long().cumsum(1) - 1).clamp_(min=0),
            use_cache=True,
            logits_to_keep=1 if "logits_to_keep" in self._accepted else None,
        )
        cache = getattr(output, self._cache_name, None)
        if cache is None or not hasattr(cache, "reorder_cache"):
            self._use_cache = False
            return None
        logits = output.logits[:, -1]
        if params.n > 1:  # each prompt was read once; its samples start from copies of its cache
            cache.reorder_cache(source)
            logits = logits[source]
        mask = None
        if ragged:
            grown = torch.ones(len(source), params.max_new_tokens, dtype=torch.int64, device=self.device)
            mask = torch.cat([real.long()[source], grown], dim=1)
        positions = lengths[source][:, None]
        trace = Trace(len(source), params.max_new_tokens, self._eos, self.pad_token_id)
        for step in range(params.max_new_tokens):
            drawn = sample_tokens(logits, uniforms[:, step], params)
            trace.record(step, drawn)
            if step + 1 == params.max_new_tokens:
                break
            tokens = drawn.tokens
            keep = trace.live_rows(step)
            if keep is not None:
                if keep.numel() == 0:
                    break
                cache.reorder_cache(keep)
                tokens, uniforms, positions = tokens[keep], uniforms[keep], positions[keep]
                mask = None if mask is None else mask[keep]
            output = self._forward(
                tokens[:, None],
                attention_mask=None if mask is None else mask[:, : width + step + 1],
                position_ids=positions + step,
                use_cache=True,
                **{self._cache_name: cache},
            )
            cache, logits = getattr(output, self._cache_name), output.logits[:, -1]
        return trace.result()

    def _decode_uncached(
        self, prompts: list[list[int]], source: Tensor, uniforms: Tensor, params: SamplingParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_decode_cached`, running the whole prefix for every token.

        Rows are right-padded here: a causal module does not look to the right, so one without a mask serves as well.
        """
        width = max(len(prompt) for prompt in prompts)
        total = width + params.max_new_tokens
        padded = [p + [self.pad_token_id] * (total - len(p)) for p in prompts]
        ids = torch.tensor(padded, device=self.device)[source]
        ends = torch.tensor([len(prompt) for prompt in prompts], device=self.device)[source]
        column = torch.arange(total, device=self.device)
        trace = Trace(len(source), params.max_new_tokens, self._eos, self.pad_token_id)
        for step in range(params.max_new_tokens):
            seen = int(ends.max())
            output = self._forward(
                ids[:, :seen],
                attention_mask=(column[:seen] < ends[:, None]).long(),
                position_ids=column[:seen].expand(len(ids), seen),
                use_cache=False,
            )
            logits = _logits(output)[torch.arange(len(ids), device=self.device), ends - 1]
            drawn = sample_tokens(logits, uniforms[:, step], params)
            trace.record(step, drawn)
            ids.scatter_(1, ends[:, None], drawn.tokens[:, None])
            ends = ends + 1
            keep = trace.live_rows(step)
            if keep is not None:
                if keep.numel() == 0:
                    break
                ids, ends, uniforms = ids[keep], ends[keep], uniforms[keep]
        return trace.result()

    def _lay_out(
        self,
        prompts: list[list[int]],
        rows: range,
        params: SamplingParams,
        tokens: Tensor,
        sampler_logprobs: Tensor,
        model_logprobs: Tensor,
    ) -> Rollouts:
        """Right-padded rollouts from prompts and sampled columns [B, T], which go on after a row's EOS."""
        ended = torch.isin(tokens, self._eos)
        stopped = ended.any(1)
        lengths = torch.where(stopped, ended.int().argmax(1) + 1, tokens.shape[1])
        starts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ends = starts + lengths
        column = torch.arange(int(ends.max()), device=self.device)
        real = column < ends[:, None]
        response = real & (column >= starts[:, None])
        widest = int(starts.max())
        prompt_ids = torch.tensor([p + [self.pad_token_id] * (widest - len(p)) for p in prompts], device=self.device)
        ids = torch.full(real.shape, self.pad_token_id, device=self.device)
        ids[:, :widest] = prompt_ids[:, : ids.shape[1]]
        valid = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]

        def place(values: Tensor) -> Tensor:
            return torch.zeros(real.shape, device=self.device).masked_scatter(response, values[valid].float())

        return Rollouts(
            input_ids=ids.masked_scatter(response, tokens[valid]),
            attention_mask=real,
            response_mask=response,
            groups=torch.tensor([row // params.n for row in rows], device=self.device),
            sampler_logprobs=place(sampler_logprobs),
            model_logprobs=place(model_logprobs),
            finish_reasons=tuple("stop" if s else "length" for s in stopped.tolist()),
            versions=response.long() * self.version,
        )

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S, H] of right-padded rows."""
        positions = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask.long(),
            "position_ids": positions,
            "use_cache": False,
        }
        base = getattr(self.model, "base_model", None)
        states = None
        if isinstance(base, nn.Module) and base is not self.model:  # without the output layer: no logits are computed
            accepted = {name: inputs[name] for name in taken(base, inputs)}
            states = getattr(base(input_ids=input_ids, **accepted), "last_hidden_state", None)
        if states is None and self._accepts("output_hidden_states"):
            output = self._forward(input_ids, output_hidden_states=True, **inputs)
            layers = getattr(output, "hidden_states", None)
            states = None if layers is None else layers[-1]
        if states is None:
            raise TypeError(
                f"{type(self.model).__name__} gives no hidden states: its forward must take output_hidden_states=True "
                "and return an object whose hidden_states[-1] is the last layer after the final norm"
            )
        return states.masked_fill(~attention_mask[..., None], 0.0)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
