"""The parts of SGLang's replies that are used, checked field by field (0.5.11 to 0.5.23)."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from .errors import SGLangRefused

T = TypeVar("T")

# (log-prob or nothing, token id, text or nothing): nothing precedes the first token, so it has no log-prob.
TokenLogprob = tuple[float | None, int, Any]


class FinishReason(BaseModel):
    """Why a response ended. An aborted one is no response: its `message` says why."""

    type: Literal["stop", "length", "abort"]
    message: str = ""


class VersionSpan(BaseModel):
    """Output tokens [start, end) were sampled under the weights named `version`."""

    version: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class MetaInfo(BaseModel):
    """What is said of a response beside its tokens."""

    finish_reason: FinishReason
    weight_version: str = ""
    weight_versions: list[VersionSpan] = []
    output_token_logprobs: list[TokenLogprob] = []
    input_token_logprobs: list[TokenLogprob] = []
    output_token_sampling_logprobs: list[float] | None = None
    hidden_states: list[list[list[float]] | list[float]] = []
    cached_tokens: int = 0


class Generated(BaseModel):
    """One response."""

    output_ids: list[int] = Field(min_length=0)
    meta_info: MetaInfo

    @model_validator(mode="after")
    def _every_token_has_its_numbers(self) -> Generated:
        ids, meta = self.output_ids, self.meta_info
        if not ids:  # nothing was asked for; 0.5.23 may still add the log-prob of a token that it then left out
            return self
        if meta.output_token_logprobs and [entry[1] for entry in meta.output_token_logprobs] != ids:
            raise ValueError("output_token_logprobs do not belong to output_ids")
        if meta.output_token_sampling_logprobs is not None and len(meta.output_token_sampling_logprobs) != len(ids):
            raise ValueError(f"{len(meta.output_token_sampling_logprobs)} sampling log-probs for {len(ids)} tokens")
        return self


class ModelInfo(BaseModel):
    """What a server says of itself at /model_info."""

    model_path: str
    served_model_name: str = ""
    weight_version: str = ""
    model_type: str | None = None


class ServerInfo(BaseModel):
    """What a server says of its settings at /server_info."""

    version: str = "unknown"
    tp_size: int = 1
    max_req_input_len: int | None = None
    enable_return_hidden_states: bool = False


class Done(BaseModel):
    """The answer to a request that changes something."""

    success: bool
    message: str = ""


def parse(kind: type[T], value: object, url: str) -> T:
    """`value` as `kind`.

    Raises:
        SGLangRefused: naming the server and the first field that is missing or of another type.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SGLangRefused(
            f"{url} answered something that is no SGLang reply: {where}: {first['msg']} ({error.error_count()} faults "
            "in "
            f"all). irlfast knows SGLang 0.5.11 to 0.5.23; is another program listening there?"
        ) from error
