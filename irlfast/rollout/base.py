"""What every rollout engine takes and returns: sampling parameters, sequences, rollouts, and the engine protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

FINISH_REASONS = ("stop", "length")

_S = TypeVar("_S", bound="Sequences")
Rows = Tensor | Sequence[int] | slice


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn.

    The order is temperature, then top-k, then top-p over what top-k left, then renormalisation.

    Args:
        max_new_tokens: most tokens sampled for a row, EOS included; at least 1.
        temperature: divides the logits; 0 takes the most likely token (greedy), whose sampler log-prob is then 0.
        top_p: keep the smallest set of most likely tokens whose mass is at least `top_p`, in (0, 1]; 1 keeps all.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        n: samples for each prompt.
        seed: the same seed, prompts and parameters give the same samples; None takes fresh entropy each call.

    Raises:
        ValueError, TypeError: a value out of its range, or not a number.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("n", 1)):
            value = getattr(self, name)
            if not _is_int(value):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.seed is not None:
            if not _is_int(self.seed):
                raise TypeError(f"seed must be an int or None, got {self.seed!r}")
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps every token), got {self.top_p}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """A batch of prompts and responses, right-padded, the response directly after its prompt in each row.

    Args:
        input_ids: [B, S] int64.
        attention_mask: [B, S] bool, True on prompt and response tokens.
        response_mask: [B, S] bool, True on response tokens, EOS included.
        groups: [B] int64, the index of the prompt that the row answers.

    Raises:
        TypeError: a field that is not a tensor of the stated dtype.
        ValueError: shapes that disagree; on the CPU also padding or a prompt in the wrong place. (On an accelerator the
            contents are not looked at: that would stall it.)
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.input_ids, Tensor) or self.input_ids.dim() != 2:
            given = tuple(self.input_ids.shape) if isinstance(self.input_ids, Tensor) else type(self.input_ids).__name__
            raise ValueError(f"input_ids must be a tensor of shape [B, S], got {given}")
        shape = tuple(self.input_ids.shape)
        self._check("input_ids", shape, torch.int64)
        self._check("attention_mask", shape, torch.bool)
        self._check("response_mask", shape, torch.bool)
        self._check("groups", shape[:1], torch.int64)
        if self.input_ids.device.type == "cpu":
            self._check_layout()

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if dtype is not None and value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}: convert it with .to({dtype})")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)} like input_ids, got {list(value.shape)}")
        if value.device != self.input_ids.device:
            raise ValueError(f"{name} is on {value.device} and input_ids on {self.input_ids.device}: move one of them")

    def _check_layout(self) -> None:
        real, response = self.attention_mask, self.response_mask
        if real.shape[1] == 0:
            return
        holes = real[:, 1:] & ~real[:, :-1]
        if bool(holes.any()):
            row, column = holes.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask[{row}] is False at {column} and True at {column + 1}: rows must be right-padded"
            )
        if bool((response & ~real).any()):
            row, column = (response & ~real).nonzero()[0].tolist()
            raise ValueError(f"response_mask[{row}, {column}] is True on padding (attention_mask is False there)")
        # A response is the end of its row: once it has begun, every real token belongs to it.
        gaps = response[:, :-1] & real[:, 1:] & ~response[:, 1:]
        if bool(gaps.any()):
            row, column = gaps.nonzero()[0].tolist()
            raise ValueError(
                f"response_mask[{row}] is True at {column} and False at {column + 1}, a token that is no padding: "
                "the response must run to the row's last token"
            )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, response tokens in each row, EOS included."""
        return self.response_mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """[B] int64, prompt tokens in each row."""
        return self.attention_mask.sum(1) - self.response_lengths

    def select(self: _S, rows: Rows) -> _S:
        """The given rows, in the given order; `rows` is a slice, a list of indices, or an index or bool tensor [B]."""
        if isinstance(rows, slice):
            index = torch.arange(len(self), device=self.input_ids.device)[rows]
        else:
            index = torch.as_tensor(rows, device=self.input_ids.device)
            if index.numel() == 0 and index.dtype != torch.bool:
                index = index.to(torch.int64)
        if index.dim() != 1 or index.dtype not in (torch.bool, torch.int64, torch.int32):
            raise TypeError(f"rows must be a slice, or 1-d of int64 or bool, got {index.dtype} {list(index.shape)}")
        if index.dtype == torch.bool:
            if index.shape[0] != len(self):
                raise ValueError(f"rows is a bool mask of {index.shape[0]} entries for {len(self)} rows")
            index = index.nonzero()[:, 0]
        picked = index.tolist()
        for row in picked:
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} is outside [0, {len(self)})")
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index]
            elif isinstance(value, tuple):
                changes[field.name] = tuple(value[row] for row in picked)
        return replace(self, **changes)

    def to(self: _S, device: torch.device | str) -> _S:
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in moved.items() if isinstance(v, Tensor)})

    def trim(self: _S) -> _S:
        """The same batch without the columns that are padding in every row."""
        width = int(self.attention_mask.sum(1).max()) if len(self) else 0
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[:, :width] for k, v in values.items() if isinstance(v, Tensor) and v.dim() > 1})

    @staticmethod
    def from_token_lists(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad_id: int,
        groups: Sequence[int] | Tensor | None = None,
    ) -> Sequences:
        """Lay out token lists as a batch.

        Args:
            prompts, responses: B token lists each; a response carries its own EOS, where it has one.
            pad_id: fills the right of the shorter rows.
            groups: B prompt indices; by default each row is a group of its own.

        Raises:
            ValueError: numbers of rows that differ, or a row without any token.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one response for each prompt")
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"row {i} has neither prompt nor response tokens")
        width = max((len(row) for row in rows), default=0)
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.int64)
        column = torch.arange(width)
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
        starts = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)[:, None]
        real = column < ends
        return Sequences(
            input_ids=ids.reshape(len(rows), width),
            attention_mask=real,
            response_mask=real & (column >= starts),
            groups=torch.arange(len(rows)) if groups is None else torch.as_tensor(groups, dtype=torch.int64),
        )

    @classmethod
    def concat(cls: type[_S], batches: Sequence[_S], pad_id: int) -> _S:
        """Put batches of this class below one another, padded to the widest. Groups are kept as they are.

        Raises:
            ValueError: no batch, or hidden states in some batches only.
            TypeError: a batch of another class.
        """
        if not batches:
            raise ValueError("concat needs at least one batch, got none")
        for i, batch in enumerate(batches):
            if not isinstance(batch, cls):
                raise TypeError(f"batches[{i}] is {type(batch).__name__}, expected {cls.__name__}")
        width = max(batch.input_ids.shape[1] for batch in batches)
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(batch, field.name) for batch in batches]
            if any(v is None for v in values):
                if any(v is not None for v in values):
                    raise ValueError(f"{field.name} is None in some batches only: have it in all or in none")
                joined[field.name] = None
            elif isinstance(values[0], tuple):
                joined[field.name] = tuple(item for value in values for item in value)
            else:
                fill = pad_id if field.name == "input_ids" else 0
                joined[field.name] = torch.cat([v if v.dim() == 1 else _widen(v, width, fill) for v in values])
        return cls(**joined)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts(Sequences):
    """Sequences whose responses an engine sampled.

    Args:
        sampler_logprobs: [B, S] float32, log-prob of the token AT that position under the sampler exactly as it sampled
            (temperature, top-k, top-p, renormalised); 0 outside the response, and 0 throughout for greedy decoding.
        model_logprobs: [B, S] float32, the same under the model alone (temperature 1, nothing cut off).
        finish_reasons: for each row "stop" (ended by EOS) or "length" (cut off at max_new_tokens).
        hidden_states: [B, S, H] or None: last layer after the final norm, at the position that reads the token.
        versions: [B, S] int64 or None: version of the weights that each response token was sampled under; 0 elsewhere.
    """

    sampler_logprobs: Tensor
    model_logprobs: Tensor
    finish_reasons: tuple[str, ...]
    hidden_states: Tensor | None = None
    versions: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.input_ids.shape)
        self._check("sampler_logprobs", shape, torch.float32)
        self._check("model_logprobs", shape, torch.float32)
        if len(self.finish_reasons) != shape[0]:
            raise ValueError(f"finish_reasons has {len(self.finish_reasons)} entries for {shape[0]} rows")
        for row, reason in enumerate(self.finish_reasons):
            if reason not in FINISH_REASONS:
                raise ValueError(f"finish_reasons[{row}] is {reason!r}, expected one of {FINISH_REASONS}")
        if self.hidden_states is not None:
            hidden = self.hidden_states
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                raise ValueError("hidden_states must be a tensor of shape [B, S, H] or None")
            self._check("hidden_states", (*shape, hidden.shape[2]), None)
        if self.versions is not None:
            self._check("versions", shape, torch.int64)


@runtime_checkable
class RolloutEngine(Protocol):
    """Anything that samples responses: a module in this process, or a server."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, return_hidden_states: bool = False
    ) -> Rollouts:
        """Sample `params.n` responses to each prompt (token ids); row i answers prompt i // n."""
        ...

    def update_weights(self, state_dict: Mapping[str, Tensor] | None, version: int) -> None:
        """Take over the policy's weights; None where the engine shares the policy's module."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _widen(values: Tensor, width: int, fill: int) -> Tensor:
    """values [B, S, ...] with S padded on the right to `width`."""
    if values.shape[1] == width:
        return values
    shape = (values.shape[0], width - values.shape[1], *values.shape[2:])
    return torch.cat([values, values.new_full(shape, fill)], dim=1)
