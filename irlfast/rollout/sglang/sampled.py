"""What to ask a server for, and how its reply becomes the log-probs of a rollout.

SGLang's log-probs are scaled by the temperature and know nothing of top-k and top-p. Where one of these cuts, the
request asks for the log-probs of the kept tokens too (`return_sampling_mask`), which the server gives for 1 < top_k <=
4096 below the vocabulary's size, so an open top_k becomes that: it leaves out tokens of the far tail and nothing else.
Log-probs at temperature 1 are read off the sampled ones there, and scored in a second pass elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irlfast.rollout.base import SamplingParams

from .errors import SGLangRefused
from .replies import Generated, VersionSpan

# The server's default bound on top_k in requests for the kept tokens' log-probs (--sampling-mask-max-tokens).
_MASK_LIMIT = 4096


@dataclass(kw_only=True)
class Response:
    """One sampled response: its tokens and, for each, log-probs and the name of the weights it was sampled under.

    `model` are the log-probs that came with the tokens, at the request's temperature; `scored` those of a second pass
    at temperature 1, where there was one.
    """

    prompt: list[int]
    ids: list[int]
    finish: str
    sampler: list[float]
    model: list[float]
    versions: list[str]
    scored: list[float] | None = None
    hidden: list[list[float]] | None = None


def truncates(params: SamplingParams, vocab_size: int) -> bool:
    """Whether top-k or top-p leaves anything out."""
    return params.temperature > 0 and (params.top_p < 1.0 or 0 < params.top_k < vocab_size)


def needs_scoring(params: SamplingParams) -> bool:
    """Whether the model's own log-probs differ from the ones that sampling returns."""
    return params.temperature not in (0.0, 1.0)


def request(prompt: Sequence[int], params: SamplingParams, *, eos: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """The /generate request for all samples of one prompt."""
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "stop_token_ids": list(eos),
    }
    body: dict[str, Any] = {"sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1}
    if truncates(params, vocab_size):
        sampling["top_p"] = params.top_p
        sampling["top_k"] = min(params.top_k or vocab_size, vocab_size - 1, _MASK_LIMIT)
        # Samples of one prompt (n) are refused together with the kept tokens, so the prompt is given n times.
        return {"input_ids": [list(prompt)] * params.n, "return_sampling_mask": True, **body}
    sampling["n"] = params.n
    return {"input_ids": list(prompt), **body}


def response(prompt: Sequence[int], reply: Generated, params: SamplingParams, *, eos: Sequence[int]) -> Response:
    """The rollout's share of one reply; to be scored where `needs_scoring`.

    Raises:
        SGLangRefused: a reply without tokens or log-probs, or one that ended on another token than asked for.
    """
    meta, ids = reply.meta_info, reply.output_ids
    if not ids or len(meta.output_token_logprobs) != len(ids):
        raise SGLangRefused(f"a reply has {len(ids)} tokens and {len(meta.output_token_logprobs)} log-probs")
    finish = "stop" if ids[-1] in eos else "length"
    if finish == "length" and len(ids) != params.max_new_tokens:
        raise SGLangRefused(
            f"the server ended a response after {len(ids)} of {params.max_new_tokens} tokens on token {ids[-1]}, "
            "which is "
            f"none of {list(eos)}: give all of the model's EOS ids, or put them into the server's model configuration"
        )
    plain = [float("nan") if entry[0] is None else entry[0] for entry in meta.output_token_logprobs]
    sampler = plain if meta.output_token_sampling_logprobs is None else meta.output_token_sampling_logprobs
    if params.temperature == 0.0:
        sampler = [0.0] * len(ids)
    return Response(
        prompt=list(prompt), ids=ids, finish=finish, sampler=sampler, model=plain,
        versions=_versions(meta.weight_versions, meta.weight_version, len(ids)),
    )  # fmt: skip


def _versions(spans: Sequence[VersionSpan], last: str, length: int) -> list[str]:
    """The weights' name for each token. Servers that give no spans name the weights at the end."""
    names = [last] * length
    for span in spans:
        names[span.start : span.end] = [span.version] * (min(span.end, length) - min(span.start, length))
    return names


def refuse_raw_logprobs(rows: Sequence[Response]) -> None:
    """Raise where the server's log-probs at another temperature than 1 are those at temperature 1.

    A server with SGLANG_RETURN_ORIGINAL_LOGPROB=1 leaves the temperature out, and what it reports is then not what it
    sampled by.
    """
    pairs = [(a, b) for row in rows for a, b in zip(row.model, row.scored or [], strict=True) if b < -0.1]
    if len(pairs) >= 8 and all(abs(a - b) < 1e-3 for a, b in pairs):
        raise SGLangRefused(
            "the server's log-probs leave the temperature out: start it without SGLANG_RETURN_ORIGINAL_LOGPROB, or "
            "sample "
            "at temperature 1"
        )
