"""Draw one token a row, and say how likely it was.

With z = logits / temperature and K the tokens that top-k and then top-p keep:

    sampler log-prob = z_y - logsumexp_{v in K} z_v        model log-prob = logits_y - logsumexp_v logits_v

A token is found by inverting the distribution function in float64 at a uniform number the caller supplies, one a row.
So a row's draw depends on its own logits and its own number alone, and a token of probability 0 is never drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import SamplingParams

# A nucleus is mostly small. Sorting 64 rows of 151,936 scores takes 450 ms on two cores, finding the best 128 takes 9.
_SHORTLIST = 128


class SampledTokens(NamedTuple):
    """tokens [B] int64, sampler_logprobs [B], model_logprobs [B] in the logits' dtype (at least float32)."""

    tokens: Tensor
    sampler_logprobs: Tensor
    model_logprobs: Tensor


def kept_candidates(scores: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The scores that may be sampled, the others -inf, and the token ids of the columns.

    Args:
        scores: [B, V], the logits over the temperature.
        top_k: 0, or how many tokens to keep; among equal scores at the edge any may be kept.
        top_p: the smallest set of most likely tokens whose mass, after top-k, is at least this much is kept.

    Returns:
        (kept [B, C], token ids [B, C]); the ids are None where the columns are the vocabulary itself.
    """
    ids: Tensor | None = None
    if 0 < top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k, dim=-1)
    if top_p == 1.0:
        return scores, ids
    normaliser = scores.double().logsumexp(-1, keepdim=True)
    if ids is None:
        scores, ids = _most_likely(scores, normaliser, top_p)
    mass = (scores - normaliser).exp_()
    # A token is kept when those before it do not reach top_p; the first one, with exactly 0 before it, always is.
    before = mass.cumsum(-1).sub_(mass)
    return scores.masked_fill(before >= top_p, float("-inf")), ids


def _most_likely(scores: Tensor, normaliser: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Scores in falling order, with their ids: a short list where it holds mass top_p in every row, else all."""
    if scores.shape[-1] > 2 * _SHORTLIST:
        best, ids = scores.topk(_SHORTLIST, dim=-1)
        if bool(((best - normaliser).exp_().sum(-1) >= top_p).all()):
            return best, ids
    return scores.sort(dim=-1, descending=True, stable=True)


def sample_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> SampledTokens:
    """Draw one token for each row.

    Args:
        logits: [B, V], any float dtype; computed in float32, or float64 for float64 logits. -inf excludes a token.
        uniforms: [B] float64 in [0, 1), read unless `params.temperature` is 0.
        params: temperature, top_k and top_p are read.

    Returns:
        SampledTokens. A row with NaN logits has NaN log-probs and some token inside the vocabulary.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    normaliser = logits.logsumexp(-1)
    if params.temperature == 0.0:
        tokens = logits.argmax(-1, keepdim=True)
        model_logprobs = logits.gather(-1, tokens)[:, 0] - normaliser
        return SampledTokens(tokens[:, 0], model_logprobs.new_zeros(model_logprobs.shape), model_logprobs)

    scores = logits if params.temperature == 1.0 else logits / params.temperature
    kept, ids = kept_candidates(scores, params.top_k, params.top_p)
    untouched = kept is logits
    kept_normaliser = normaliser if untouched else kept.logsumexp(-1)
    cdf = (kept - kept_normaliser[:, None]).exp_().cumsum(-1, dtype=torch.float64)
    # The first column whose cumulated mass exceeds the point: one without mass never is. The point stays below the
    # total, for a double of at most 1 - 2^-53 times the total rounds to less than it. NaN alone meets the clamp.
    point = uniforms[:, None] * cdf[:, -1:]
    column = torch.searchsorted(cdf, point, right=True).clamp_(max=cdf.shape[-1] - 1)
    tokens = column if ids is None else ids.gather(-1, column)
    model_logprobs = logits.gather(-1, tokens)[:, 0] - normaliser
    sampler_logprobs = model_logprobs if untouched else kept.gather(-1, column)[:, 0] - kept_normaliser
    return SampledTokens(tokens[:, 0], sampler_logprobs, model_logprobs)
