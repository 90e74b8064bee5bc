"""The reward inside an IQ-trained language model: r_t = q_t - gamma V_{t+1}, read off its own logits.

No further network is trained: the logit of a token is its soft Q-value (see `irlfast.losses.iq_learn`). The sum over a
finished response at gamma = temperature = 1 is log pi(y|x) + V(x), so that one prompt's answers come in the order of
their likelihood; docs/iq_learn.md says what to use where that is not wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from irlfast.causal_lm import causal_lm_policy_ref_stats, causal_lm_token_stats
from irlfast.losses.iq_learn import Truncated, iq_learn_rewards, states_after
from irlfast.ops import PolicyRefStats, TokenStats


class IQStatistics(NamedTuple):
    """What `iq_learn_loss` reads, each [B, T] or one column wider: entry t speaks of the token at t.

    q: its logit. lse: logsumexp(logits / temperature) before it; also one place after the last token of a response that
    was cut off. mask: bool, response tokens. logprob: log pi, at `temperature`. ref_logprob, kl: the reference's
    log-prob and the exact KL(pi || reference) of the token's distribution; None without a reference.
    """

    q: Tensor
    lse: Tensor
    mask: Tensor
    logprob: Tensor
    ref_logprob: Tensor | None
    kl: Tensor | None


def iq_statistics(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    ended: Tensor,  # (B)
    *,
    temperature: float = 1.0,
    truncated: Truncated = "bootstrap",
    reference: nn.Module | None = None,
) -> IQStatistics:
    """Run a causal language model over prompts and responses, with its logits never whole where its head allows it.

    Args:
        model: as in `causal_lm.causal_lm_token_stats`.
        input_ids: [B, T] right-padded token ids.
        attention_mask, response_mask: [B, T] bool, real tokens and response tokens.
        ended: [B] bool, the response ended with EOS.
        temperature, truncated: as in `losses.iq_learn_loss`.
        reference: run without gradients, for the divergence from it.
    """
    after = torch.zeros_like(response_mask)
    if truncated == "bootstrap" and not bool(ended.all()):
        # Room for the state that has read the last token. What stands there is read by nobody, but has to be a token.
        input_ids = torch.cat([input_ids, input_ids[:, :1]], dim=1)
        attention_mask, response_mask = (nn.functional.pad(m, (0, 1)) for m in (attention_mask, response_mask))
        after = states_after(response_mask, ended)
        input_ids = torch.where(after, input_ids[:, :1], input_ids)
    asked = response_mask | after
    stats: TokenStats | PolicyRefStats
    if reference is None:
        stats = causal_lm_token_stats(
            model, input_ids, attention_mask=attention_mask, token_mask=asked, temperature=temperature
        )
        ref_logprob, kl = None, None
    else:
        both = causal_lm_policy_ref_stats(
            model, reference, input_ids, attention_mask=attention_mask, token_mask=asked, temperature=temperature
        )
        stats, ref_logprob, kl = both, both.ref_logprob, both.reverse_kl
    q = temperature * (stats.logprob + stats.lse)
    return IQStatistics(q, stats.lse, response_mask, stats.logprob, ref_logprob, kl)


class IQTokenRewards(NamedTuple):
    """A batch's rewards. All but `returns` and `relative_returns` are [B, T], 0 outside the responses.

    rewards: r_t. advantages: log pi(y_t | s_t), what soft Q-learning calls (Q - V) / tau. values: V_t. returns: [B],
    the sum of r_t. relative_returns: [B], sum of log pi - log pi_ref, relative to a baseline; None without one.
    """

    rewards: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    relative_returns: Tensor | None


class IQReward:
    """Token rewards of responses under an IQ-trained language model.

    Args:
        model: the trained policy; its mode is left alone, so put it in evaluation mode.
        gamma, temperature, truncated: as it was trained with.
        reference: the model it was trained from, for rewards relative to it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float = 1.0,
        temperature: float = 1.0,
        truncated: Truncated = "bootstrap",
        reference: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.gamma = gamma
        self.temperature = temperature
        self.truncated: Truncated = truncated
        self.reference = reference

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, ended: Tensor
    ) -> IQTokenRewards:
        """Rewards of a batch; arguments as in `iq_statistics`."""
        width = input_ids.shape[1]
        stats = iq_statistics(
            self.model,
            input_ids,
            attention_mask,
            response_mask,
            ended,
            temperature=self.temperature,
            truncated=self.truncated,
            reference=self.reference,
        )
        rewards, values, _, returns = iq_learn_rewards(
            stats.q,
            stats.lse,
            stats.mask,
            ended=ended,
            gamma=self.gamma,
            temperature=self.temperature,
            truncated=self.truncated,
        )
        advantages = torch.where(stats.mask, stats.logprob, 0.0)
        relative = None
        if stats.ref_logprob is not None:
            relative = torch.where(stats.mask, stats.logprob - stats.ref_logprob, 0.0).sum(dim=1)
        return IQTokenRewards(rewards[:, :width], advantages[:, :width], values[:, :width], returns, relative)
