"""Forward passes the trainers share: statistics of response tokens under a causal language model.

Everything here is aligned as in `irlfast.rollout.Sequences`: entry [b, s] speaks of the token AT position s, given the
tokens before it; the first column, which nothing predicts, is 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from irlfast import ops
from irlfast.causal_lm import IGNORE, at_their_tokens, next_token_labels
from irlfast.rollout import Sequences


class ResponseScores(NamedTuple):
    """stats: TokenStats of [B, S] tensors, 0 outside the response; hidden: [B, S, H] last layer, or None."""

    stats: ops.TokenStats
    hidden: Tensor | None


def response_scores(model: nn.Module, sequences: Sequences, *, hidden_states: bool = False) -> ResponseScores:
    """Log-prob, entropy and log-sum-exp of every response token under `model`, differentiable.

    Args:
        model: called as model(input_ids=, attention_mask=, use_cache=False); its output has `.logits` [B, S, V].
        sequences: prompts and responses.
        hidden_states: also return the last layer's states after the final norm.
    """
    optional = {"output_hidden_states": True} if hidden_states else {}
    output = model(
        input_ids=sequences.input_ids,
        attention_mask=sequences.attention_mask.long(),
        use_cache=False,
        **optional,
    )
    labels = next_token_labels(sequences.input_ids, sequences.response_mask)
    aligned = at_their_tokens(ops.token_stats(output.logits, labels, ignore_index=IGNORE))
    return ResponseScores(aligned, output.hidden_states[-1] if hidden_states else None)


def sequence_sum(values: Tensor, sequences: Sequences) -> Tensor:
    """Sum over each response's tokens: [B, S] -> [B]."""
    return ops.sequence_logprobs(values, sequences.response_mask)
