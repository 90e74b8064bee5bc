"""Demonstrations as trajectories of hidden states: the expert side of BiLevelOptimizer.

A file is a list of dicts written by torch.save, read with weights_only=True,

    {"hidden_states": Tensor [S, H], "actions": Tensor [S], "length": int, "group": int, "rewards": ..., "returns": ...}

of which hidden_states and actions are needed: one row a token of the response, EOS included. `length` cuts trailing
padding off, `group` names the prompt, and further fields are left alone, for it is the reward that is to be learned.
Or it is text (JSON lines and whatever `load_demonstrations` reads), whose hidden states a language model gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irlfast.data import DataError, TokenizedDemonstration, load_demonstrations, tokenize_demonstrations
from irlfast.rewards import ReaderConfig, read
from irlfast.rollout import Rollouts, Sequences

from .scoring import sequence_sum
from .seeds import EndlessDraws


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """B trajectories, padded on the right.

    Args:
        hidden_states: [B, S, H]; 0 on padding.
        actions: [B, S] token ids; 0 on padding.
        mask: [B, S] bool.
        groups: [B] integer prompt ids, or None where they are not known.
    """

    hidden_states: Tensor
    actions: Tensor
    mask: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return self.mask.shape[0]

    def to(self, device: torch.device | str) -> Trajectories:
        """The same on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Trajectories(**{"groups": None, **moved})


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One of them: hidden_states [S, H], actions [S]."""

    hidden_states: Tensor
    actions: Tensor
    group: int | None = None


def collate(rows: Sequence[Trajectory]) -> Trajectories:
    """Trajectories of any lengths as one batch."""
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row.actions) for row in rows])
    known = [row.group for row in rows if row.group is not None]
    return Trajectories(
        hidden_states=pad([row.hidden_states for row in rows], batch_first=True),
        actions=pad([row.actions for row in rows], batch_first=True),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        groups=torch.tensor(known) if len(known) == len(rows) else None,
    )


class ExpertLoader:
    """Batches of expert trajectories, drawn in a fresh random order for each pass through them.

    Iterating is one pass, from where the last one ended. `position` is its whole state, for a checkpoint.
    """

    def __init__(
        self, rows: Sequence[Trajectory], *, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.rows = list(rows)
        self.batch_size = min(batch_size, len(self.rows))
        self.device = device
        self._draws = EndlessDraws(self.rows, seed, "expert trajectories")

    @property
    def position(self) -> int:
        """How many trajectories were drawn."""
        return self._draws.position

    @position.setter
    def position(self, value: int) -> None:
        self._draws.position = value

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.rows) // self.batch_size)

    def draw(self) -> Trajectories:
        """The next batch; it may span two passes."""
        return collate(self._draws.draw(self.batch_size)).to(self.device)

    def __iter__(self) -> Iterator[Trajectories]:
        return (self.draw() for _ in range(len(self)))


def load_expert_demonstrations(
    source: str | Path,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    *,
    eos_token_id: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    model: nn.Module | None = None,
    max_response_tokens: int = 512,
    token_statistics: bool = False,
) -> ExpertLoader:
    """Read expert trajectories.

    Args:
        source: a .pt file of dicts, as in the module's description, or text.
        batch_size: trajectories a batch.
        device: where batches are put.
        eos_token_id: the token that ends a response. Where given, a .pt trajectory that does not end with it is an
            error: rollouts do end with it, and a reward would tell the two apart by that alone.
        seed: of the order.
        tokenizer, model: for text, the language model whose last hidden states the reward reads, and its tokenizer.
            The responses get the tokenizer's EOS, as those of a sampler do.
        max_response_tokens: longer texts are cut, and then have no EOS, as those of a sampler cut off there.
        token_statistics: for text, put each token's log-prob and entropy under the model beside its state.

    Raises:
        DataError: a file or trajectory that cannot be used, naming file, trajectory and field.
        FileNotFoundError: a path that does not exist. ValueError: text without a tokenizer and a model.
    """
    path = Path(source)
    if path.suffix in (".pkl", ".pickle"):
        raise DataError(f"{path}: pickle runs whatever code a file holds; write the list with torch.save to a .pt file")
    if path.suffix in (".pt", ".pth"):
        rows = [_trajectory(row, f"{path}[{i}]", eos_token_id) for i, row in enumerate(_load_list(path))]
    elif tokenizer is None or model is None:
        raise ValueError(f"{source} is text: give tokenizer= and model=, which the hidden states come from")
    else:
        rows = _read_text(source, tokenizer, model, max_response_tokens, token_statistics)
    widths = sorted({row.hidden_states.shape[1] for row in rows})
    if len(widths) > 1:
        raise DataError(f"{path}: hidden_states have different widths, {widths}: take all from one model")
    return ExpertLoader(rows, batch_size=batch_size, seed=seed, device=device)


def read_rollouts(rollouts: Any) -> tuple[Trajectories, Tensor | None]:
    """Trajectories of rollouts in any of the forms that `update_reward_model` takes, and their log-probs [K]."""
    if isinstance(rollouts, Rollouts):
        if rollouts.hidden_states is None:
            raise ValueError("the rollouts have no hidden states: generate(..., return_hidden_states=True)")
        samples = _cut_out(rollouts.hidden_states, rollouts.input_ids, rollouts.response_mask, rollouts.groups)
        return samples, sequence_sum(rollouts.sampler_logprobs, rollouts)
    if isinstance(rollouts, Mapping):
        states = rollouts.get("hidden_states")
        if not isinstance(states, Tensor) or states.dim() != 3:
            raise ValueError('policy_rollouts["hidden_states"] must be a tensor [K, S, H]')
        mask = rollout_mask(rollouts, states)
        actions = rollouts.get("actions", torch.zeros(mask.shape, dtype=torch.int64))
        samples = _cut_out(states, actions, mask, rollouts.get("groups"))
        log_probs = rollouts.get("log_probs")
        if log_probs is not None and log_probs.dim() == 2:
            log_probs = torch.where(mask, log_probs, 0.0).sum(1)
        return samples, log_probs
    if isinstance(rollouts, Sequence) and rollouts and all(isinstance(row, Mapping) for row in rollouts):
        rows = [
            Trajectory(hidden_states=row["hidden_states"], actions=row["actions"], group=row.get("group"))
            for row in rollouts
        ]
        known = [torch.as_tensor(row["log_probs"]).float().sum() for row in rollouts if "log_probs" in row]
        return collate(rows), torch.stack(known) if len(known) == len(rows) else None
    raise TypeError(f"policy_rollouts is {type(rollouts).__name__}; expected Rollouts, a dict, or a list of dicts")


def _cut_out(states: Tensor, actions: Tensor, mask: Tensor, groups: Tensor | None) -> Trajectories:
    """The masked positions alone, wherever in a row they stand."""
    known: list[int | None] = [None] * len(mask) if groups is None else groups.tolist()
    rows = zip(states, actions, mask, known, strict=True)
    return collate([Trajectory(hidden_states=h[m], actions=a[m], group=group) for h, a, m, group in rows])


def rollout_mask(rollouts: Mapping[str, Any], states: Tensor) -> Tensor:
    """[K, S] bool of a dict of rollouts, from its mask or its lengths."""
    mask, lengths = rollouts.get("mask", rollouts.get("response_mask")), rollouts.get("lengths")
    if mask is None and lengths is not None:
        mask = torch.arange(states.shape[1]) < torch.as_tensor(lengths)[:, None]
    if mask is None:
        raise ValueError(
            "the rollouts need a mask [K, S] or lengths [K]: what stands beyond a response must not be read"
        )
    if tuple(mask.shape) != tuple(states.shape[:2]):
        raise ValueError(f"mask has shape {list(mask.shape)}; expected {list(states.shape[:2])}, as hidden_states")
    return mask.bool()


def _load_list(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # UnpicklingError, RuntimeError, EOFError and others, whatever torch trips over
        raise DataError(
            f"{path} cannot be read with weights_only=True: it must hold a list of dicts of tensors and numbers, "
            f"written by torch.save ({type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''})"
        ) from cause
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"{path} holds {type(loaded).__name__}; expected a list of at least one dict")
    return loaded


def _trajectory(row: Any, where: str, eos_token_id: int | None) -> Trajectory:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is {type(row).__name__}; expected a dict with hidden_states and actions")
    for name, dims in (("hidden_states", 2), ("actions", 1)):
        value = row.get(name)
        if not isinstance(value, Tensor) or value.dim() != dims:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{where}: field {name!r} must be a tensor of {dims} dimensions, got {found}")
    hidden, actions = row["hidden_states"].float(), row["actions"].long()
    length = int(row.get("length", len(actions)))
    if not 0 < length <= min(len(hidden), len(actions)):
        raise DataError(
            f"{where}: length {length} does not fit hidden_states {list(hidden.shape)}, actions {list(actions.shape)}"
        )
    hidden, actions = hidden[:length], actions[:length]
    if not bool(hidden.isfinite().all()):
        raise DataError(f"{where}: field 'hidden_states' has values that are not finite")
    if eos_token_id is not None and int(actions[-1]) != eos_token_id:
        raise DataError(
            f"{where}: the last action is {int(actions[-1])}, not EOS ({eos_token_id}): rollouts end with EOS, and a "
            "reward would learn that difference and nothing else. Let the trajectory include EOS and its hidden state"
        )
    group = row.get("group")
    return Trajectory(hidden_states=hidden, actions=actions, group=None if group is None else int(group))


def _read_text(
    source: str | Path, tokenizer: Any, model: nn.Module, max_response_tokens: int, token_statistics: bool
) -> list[Trajectory]:
    demonstrations = tokenize_demonstrations(
        load_demonstrations(source), tokenizer, max_response_tokens=max_response_tokens
    )
    prompts: dict[tuple[int, ...], int] = {}
    groups = [prompts.setdefault(row.prompt_ids, len(prompts)) for row in demonstrations]
    return read_trajectories(demonstrations, groups, model, token_statistics=token_statistics)


@torch.no_grad()
def read_trajectories(
    rows: Sequence[TokenizedDemonstration],
    groups: Sequence[int | None],
    model: nn.Module,
    *,
    token_statistics: bool,
    batch_size: int = 1,
) -> list[Trajectory]:
    """Responses as a reward sees them: the model's last hidden states at their tokens, on the CPU.

    Args:
        rows: prompts and responses as token ids.
        groups: each row's prompt.
        model: the causal language model that is read.
        token_statistics: put each token's log-prob and entropy beside its state.
        batch_size: rows of like length in one pass.
    """
    reader = ReaderConfig(model="", token_statistics=token_statistics)
    device = next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + len(rows[i].response_ids))
    found: dict[int, Trajectory] = {}
    for low in range(0, len(order), batch_size):
        part = order[low : low + batch_size]
        prompts, responses = [list(rows[i].prompt_ids) for i in part], [list(rows[i].response_ids) for i in part]
        batch = Sequences.from_token_lists(prompts, responses, 0).to(device)
        states = read(model, batch.input_ids, batch.attention_mask, batch.response_mask, reader).hidden_states
        for i, row, mask in zip(part, states, batch.response_mask, strict=True):
            found[i] = Trajectory(
                hidden_states=row[mask].float().cpu(), actions=torch.tensor(rows[i].response_ids), group=groups[i]
            )
    return [found[i] for i in range(len(rows))]
