"""What a reward on hidden states reads: a frozen language model's states, and how likely it found each token.

The last layer speaks of the token to come, not of whether the last one fitted. So beside each response token's state
may stand two numbers of the same pass: the token's log-prob and the entropy it was drawn from.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from irlfast import ops
from irlfast.causal_lm import IGNORE, at_their_tokens, next_token_labels

if TYPE_CHECKING:
    from .base import BaseRewardModel


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Where a reward's hidden states come from.

    Args:
        model: folder or hub name of the causal language model; "" where it has none.
        layer: which of its hidden states, as an index of transformers' `hidden_states`; -1 is the last, after the norm.
        token_statistics: also read each response token's log-prob and entropy: the width is then H + 2.
        weights: `weights_digest` of that model, which tells it from one of the same name or width; "" is unknown.
    """

    model: str = ""
    layer: int = -1
    token_statistics: bool = True
    weights: str = ""

    def width(self, hidden_size: int) -> int:
        """Features a position, for a language model of width `hidden_size`."""
        return hidden_size + (2 if self.token_statistics else 0)


def lasting_name(name: str) -> str:
    """A model's name that holds wherever it is read: the absolute path of a folder, a hub name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell a model from others and from most of its tuned forms; "" without weights.

    From the first values of every parameter, in bfloat16, so that it is the same however the model was cast.
    """
    digest = hashlib.sha256()
    parameters = list(model.parameters())
    for parameter in parameters:
        values = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16] if parameters else ""


class Reading(NamedTuple):
    """hidden_states [B, S, H], or [B, S, H + 2] with token statistics; stats: TokenStats of [B, S], at their tokens."""

    hidden_states: Tensor
    stats: ops.TokenStats


class ResponsePass(NamedTuple):
    """stats: TokenStats of [B, S] tensors, 0 outside the response; hidden: [B, S, H] of a layer asked for, or None."""

    stats: ops.TokenStats
    hidden: Tensor | None


def response_pass(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, *, layer: int | None = None
) -> ResponsePass:
    """Log-prob, entropy and log-sum-exp of every response token under `model`, and its hidden states; differentiable.

    Args:
        model: called as model(input_ids=, attention_mask=, use_cache=False); its output has `.logits` [B, S, V].
        input_ids: [B, S] int64, right-padded. attention_mask, response_mask: [B, S] bool.
        layer: which of the output's `hidden_states` to return; None asks for none.

    Raises:
        IndexError: the model has no such layer.
    """
    optional = {} if layer is None else {"output_hidden_states": True}
    output = model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, **optional)
    labels = next_token_labels(input_ids, response_mask)
    stats = at_their_tokens(ops.token_stats(output.logits, labels, ignore_index=IGNORE))
    if layer is None:
        return ResponsePass(stats, None)
    layers = output.hidden_states
    if not -len(layers) <= layer < len(layers):
        raise IndexError(f"layer {layer} is outside [{-len(layers)}, {len(layers)}): {len(layers)} hidden states")
    return ResponsePass(stats, layers[layer])


def read(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, config: ReaderConfig
) -> Reading:
    """One pass of `model`: what a reward on hidden states reads, and the statistics of the response's tokens.

    Args: as for `response_pass`; `config` says which states.
    """
    stats, hidden = response_pass(model, input_ids, attention_mask, response_mask, layer=config.layer)
    assert hidden is not None
    if config.token_statistics:
        columns = torch.stack([stats.logprob, stats.entropy], dim=-1)
        hidden = torch.cat([hidden, columns.to(hidden.dtype)], dim=-1)
    return Reading(hidden, stats)


@torch.no_grad()
def reward_inputs(
    reward: BaseRewardModel,
    language_model: nn.Module | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
) -> tuple[Tensor, ...]:
    """The positional inputs of `reward` for a batch of sequences, whatever it reads.

    Args:
        reward: any reward model; one on hidden states was told by `reward.source` which ones it reads.
        language_model: the model that they come from; not needed by a reward that reads tokens.
        input_ids, attention_mask, response_mask: as for `response_pass`.

    Raises:
        ValueError: a reward on hidden states without a language model, or without a `source`.
    """
    if reward.reads == "tokens":
        return input_ids, attention_mask, response_mask
    if language_model is None or reward.source is None:
        raise ValueError(
            f"a {type(reward).__name__} reads hidden states: give the language model that they come from, and set "
            "reward.source = ReaderConfig(...) where the model was saved without it"
        )
    hidden = read(language_model, input_ids, attention_mask, response_mask, reward.source).hidden_states
    return hidden, response_mask, attention_mask
