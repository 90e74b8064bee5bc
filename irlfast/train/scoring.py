"""Forward passes the trainers share: statistics of response tokens under a causal language model.

Everything here is aligned as in `irlfast.rollout.Sequences`: entry [b, s] speaks of the token AT position s, given the
tokens before it; the first column, which nothing predicts, is 0.
"""

from __future__ import annotations

from torch import Tensor, nn

from irlfast import ops
from irlfast.rewards.reader import ResponsePass, response_pass
from irlfast.rollout import Sequences

ResponseScores = ResponsePass


def response_scores(model: nn.Module, sequences: Sequences, *, hidden_states: bool = False) -> ResponseScores:
    """Log-prob, entropy and log-sum-exp of every response token under `model`, differentiable.

    Args:
        model: called as model(input_ids=, attention_mask=, use_cache=False); its output has `.logits` [B, S, V].
        sequences: prompts and responses.
        hidden_states: also return the last layer's states after the final norm.
    """
    layer = -1 if hidden_states else None
    return response_pass(model, sequences.input_ids, sequences.attention_mask, sequences.response_mask, layer=layer)


def sequence_sum(values: Tensor, sequences: Sequences) -> Tensor:
    """Sum over each response's tokens: [B, S] -> [B]."""
    return ops.sequence_logprobs(values, sequences.response_mask)
