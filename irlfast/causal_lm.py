"""Token statistics of a causal language model, with or without its logits as a whole.

The hidden path runs the model for the logits of one position only, takes the hidden states h that its base model hands
to the output head, and gives them to `ops.linear_token_stats`, which passes over those that predict no wanted token and
knows heads of the form

    logits = softcap(s (h W^T + b)),      softcap(l) = c tanh(l / c) or nothing,

so that [B, T, V] logits never exist. s is what Cohere calls logit_scale and Granite 1 / logits_scaling; c is Gemma 2's
final_logit_softcapping. Models do other things to their logits, too, and the same name means different things in
different families. So the one position that the model did compute is compared with this formula in every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from irlfast import ops

Path = Literal["auto", "hidden", "logits"]
PATHS: tuple[str, ...] = get_args(Path)
IGNORE = -100
_Stats = TypeVar("_Stats", ops.TokenStats, ops.PolicyRefStats)

_INSTEAD = "use path='logits', or ops.token_stats on model(...).logits"


class NoLinearHeadError(TypeError):
    """The model is none whose logits are softcap(s (h W^T + b)) of hidden states one can get at."""


class LinearHead(NamedTuple):
    """logits = softcap(scale (h weight^T + bias)) of the hidden states h that `base` returns.

    weight: [V, D]. bias: [V] or None. scale: a positive number. softcap: a positive number or None.
    """

    base: nn.Module
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


def causal_lm_token_stats(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    token_mask: Tensor | None = None,  # (B, T)
    temperature: float | Tensor = 1.0,
    path: Path = "auto",
    impl: str = "auto",
    memory_budget: int = 1 << 30,
    **model_inputs: Any,
) -> ops.TokenStats:
    """Log-prob, entropy and log-sum-exp of tokens under a causal language model, given the tokens before them.

    Args:
        model: a transformers causal language model, also inside a PeftModel or DistributedDataParallel, or any module
            called as model(input_ids=...) that returns logits [B, T, V] or an object with `.logits`. Its mode is left
            alone: dropout stays on in a model that trains.
        input_ids: [B, T] integers.
        attention_mask: [B, T], non-zero on real tokens, padding on either side; None is no padding. With it,
            position_ids counted from the first real token are passed to a model that takes them.
        token_mask: [B, T], non-zero on the tokens that are asked for; by default all that follow a real token. Only the
            positions that predict these go through the output head. Nothing predicts the first column: it is never
            asked for.
        temperature: a positive number, or a tensor that broadcasts to [B, T].
        path: "hidden" computes no logits but at one position; "logits" takes what the model returns; "auto" takes
            "hidden" where `linear_head` finds the head, else "logits". A model in bfloat16 rounds its logits to 8 bits,
            the hidden path does not, so the two agree to that rounding.
        impl: as in ops.token_stats and ops.linear_token_stats.
        memory_budget: as in ops.linear_token_stats: bytes of logits to keep for backward on the hidden path, where they
            fit; 0 keeps none and computes them again.
        model_inputs: further arguments of the model.

    Returns:
        TokenStats of [B, T] tensors: entry [b, t] speaks of the token AT position t; 0 without gradient where no token
        was asked for. Gradients reach every parameter, the head's (tied or not) too. Under torch.autocast the head is
        applied in autocast's dtype, as the model does.

    Raises:
        NoLinearHeadError: path "hidden" for a model whose head was not found; or, on either of "hidden" and "auto", a
            model that does something to its logits which the formula above lacks.
        IndexError: a token asked for is outside the vocabulary. ValueError: shapes, an unknown path.
    """
    token_mask = _checked(path, input_ids, attention_mask, token_mask)
    inputs = _model_inputs(model, input_ids, attention_mask) | model_inputs

    head = _head_for(path, model)
    labels = next_token_labels(input_ids, token_mask)
    # On either path the last T positions count: virtual tokens of prompt tuning stand before them.
    if isinstance(temperature, Tensor) and temperature.dim() and temperature.shape[-1] > 1:
        temperature = temperature.roll(-1, dims=-1)
    if head is None:
        logits = _logits(model(**inputs))[:, -input_ids.shape[1] :]
        stats = ops.token_stats(logits, labels, temperature=temperature, ignore_index=IGNORE, impl=impl)
    else:
        stats = ops.linear_token_stats(
            _hidden_states(model, head, inputs).to(head.weight.dtype),
            head.weight,
            labels,
            bias=head.bias,
            temperature=temperature / head.scale,
            softcap=None if head.softcap is None else head.softcap / head.scale,
            ignore_index=IGNORE,
            impl=impl,
            memory_budget=memory_budget,
        )
    return at_their_tokens(stats)


def causal_lm_policy_ref_stats(
    model: nn.Module,
    reference: nn.Module,
    input_ids: Tensor,  # (B, T)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    token_mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    path: Path = "auto",
    impl: str = "auto",
) -> ops.PolicyRefStats:
    """Statistics of tokens under a policy and their divergence from a reference over the whole vocabulary.

    On the hidden path, which needs heads with the same scale and softcap, neither model's logits exist whole
    (`ops.linear_policy_ref_stats`). The reference is run without gradients, in the mode that it is in. Arguments,
    alignment and errors are as in `causal_lm_token_stats`.

    Returns:
        PolicyRefStats of [B, T] tensors, entry [b, t] about the token AT t; 0 and no gradient where none was asked for.
    """
    token_mask = _checked(path, input_ids, attention_mask, token_mask)
    labels = next_token_labels(input_ids, token_mask)
    inputs, ref_inputs = (_model_inputs(m, input_ids, attention_mask) for m in (model, reference))
    head, ref_head = _head_for(path, model), _head_for(path, reference)
    width = input_ids.shape[1]
    if head is None or ref_head is None or (head.scale, head.softcap) != (ref_head.scale, ref_head.softcap):
        if path == "hidden":
            raise NoLinearHeadError(
                f"the heads of model and reference scale or cap their logits differently: {_INSTEAD}"
            )
        logits = _logits(model(**inputs))[:, -width:]
        with torch.no_grad():
            ref_logits = _logits(reference(**ref_inputs))[:, -width:]
        options = {"temperature": temperature, "ignore_index": IGNORE, "impl": impl}
        own, ref = (ops.token_stats(x, labels, **options) for x in (logits, ref_logits))  # type: ignore[arg-type]
        asked = labels != IGNORE
        reverse, forward = (
            torch.where(asked, ops.token_kl(logits, ref_logits, kind=kind, temperature=temperature), 0.0)
            for kind in ("reverse", "forward")
        )
        return at_their_tokens(ops.PolicyRefStats(*own, ref.logprob, reverse, forward))
    hidden = _hidden_states(model, head, inputs).to(head.weight.dtype)
    with torch.no_grad():
        ref_hidden = _hidden_states(reference, ref_head, ref_inputs).to(ref_head.weight.dtype)
    stats = ops.linear_policy_ref_stats(
        hidden,
        head.weight,
        ref_hidden,
        ref_head.weight,
        labels,
        bias=head.bias,
        ref_bias=ref_head.bias,
        temperature=temperature / head.scale,
        softcap=None if head.softcap is None else head.softcap / head.scale,
        ignore_index=IGNORE,
        impl=impl,
    )
    return at_their_tokens(stats)


def linear_head(model: nn.Module) -> LinearHead:
    """The output head of a transformers causal language model, its scale and softcap read from model and config.

    Raises:
        NoLinearHeadError: saying what was found in its place. Whether the model applies the head in just this way shows
            only when it runs.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if not callable(getattr(inner, "get_output_embeddings", None)):
        raise NoLinearHeadError(f"{name} has no get_output_embeddings(), as transformers models do: {_INSTEAD}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise NoLinearHeadError(f"{name} is an encoder-decoder model; a causal language model is needed")
    if not taken(inner, ["logits_to_keep"]):
        raise NoLinearHeadError(f"{name} takes no logits_to_keep and would compute all logits: {_INSTEAD}")
    base = inner.base_model
    if base is inner:
        raise NoLinearHeadError(f"{name} has no base model apart from itself to take hidden states from: {_INSTEAD}")
    wrapped = hasattr(model, "_orig_mod") or hasattr(inner, "_orig_mod")
    if wrapped or inner._compiled_call_impl is not None or base._compiled_call_impl is not None:
        raise NoLinearHeadError(
            f"{name} was compiled as a whole, and compiled code may pass over the hook that takes the hidden states: "
            f"compile its layers one by one, or {_INSTEAD}"
        )
    head = inner.get_output_embeddings()
    # One with a forward of its own (LoRA on the head, 4-bit weights, a patched instance) computes other logits.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise NoLinearHeadError(f"the output head of {name} is a {kind}, not a plain torch.nn.Linear: {_INSTEAD}")
    weight = head.weight
    whole = type(weight.data) is Tensor and weight.shape == (head.out_features, head.in_features)  # not sharded
    if not whole or not weight.is_floating_point():
        kind = f"{type(weight.data).__name__} of {weight.dtype} and shape {tuple(weight.shape)}"
        raise NoLinearHeadError(f"the output weight of {name} is a {kind}, not a whole floating one: {_INSTEAD}")
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return LinearHead(base, head.weight, head.bias, _scale(inner, config), softcap or None)


def next_token_labels(input_ids: Tensor, token_mask: Tensor) -> Tensor:
    """Labels [B, T] of the logits at each position: the next token where token_mask has it, else IGNORE.

    Shifting the labels, not the logits, leaves the logits contiguous.
    """
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, :-1] = torch.where(token_mask.bool(), input_ids, IGNORE)[:, 1:]
    return labels


def at_their_tokens(stats: _Stats) -> _Stats:
    """[B, T] statistics from where tokens are predicted to where they stand; 0 in the first column."""
    return type(stats)(*(nn.functional.pad(value[:, :-1], (1, 0)) for value in stats))


def taken(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that the module's forward has as a parameter; all, if it takes any."""
    parameters = inspect.signature(module.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [name for name in names if any_name or name in parameters]


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a DistributedDataParallel or PeftModel; any other module as it is."""
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _scale(inner: Any, config: Any) -> float:
    """What the model multiplies its logits by. A family whose rule this is not fails the comparison in every call."""
    if config.model_type == "hyperclovax":
        return float(config.logits_scaling)
    if getattr(config, "logits_scaling", None):  # Granite, MiniCPM3
        return 1.0 / float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        return float(config.lm_head_multiplier)
    # Cohere. MPT has it in its config and does not apply it.
    return float(getattr(inner, "logit_scale", None) or 1.0)


def _checked(path: str, input_ids: Tensor, attention_mask: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """The mask of the tokens asked for, by default all that follow a real one."""
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; expected one of {PATHS}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected [B, T]")
    for name, mask in (("attention_mask", attention_mask), ("token_mask", token_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected {tuple(input_ids.shape)} as input_ids")
    if token_mask is None:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_mask = real.bool() & nn.functional.pad(real.bool()[:, :-1], (1, 0))
    return token_mask


def _head_for(path: str, model: nn.Module) -> LinearHead | None:
    """The head that the hidden path goes through; None for the logits path."""
    if path == "logits":
        return None
    try:
        return linear_head(model)
    except NoLinearHeadError:
        if path == "hidden":
            raise
        return None


def _model_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    inner = unwrap(model)
    optional: dict[str, Any] = {"use_cache": False}
    if attention_mask is not None:
        optional["attention_mask"] = attention_mask.long()
        optional["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids} | {name: optional[name] for name in taken(inner, optional)}
    if attention_mask is not None and "attention_mask" not in inputs:
        real = attention_mask.bool()
        if bool((real.any(dim=1) & ~real[:, 0]).any()):
            raise ValueError(
                f"{type(inner).__name__} takes no attention_mask and would read the padding before a row's tokens: pad "
                "on the right"
            )
    return inputs


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _hidden_states(model: nn.Module, head: LinearHead, inputs: dict[str, Any]) -> Tensor:
    """[B, T, D], what the model hands to its head, once the head is known to do what `head` says.

    The model itself is called, not its base, so that what wraps it (DistributedDataParallel, adapters) has its part.
    """
    seen: list[Any] = []
    # Some (OPT) call not their base model but the decoder in it. Where both run, the outer one ends last.
    base: Any = head.base
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    hooks = [m.register_forward_hook(lambda _, __, output: seen.append(output)) for m in {base, decoder}]
    try:
        logits = _logits(model(**inputs, logits_to_keep=1))
    finally:
        for hook in hooks:
            hook.remove()
    name = type(unwrap(model)).__name__
    if not seen:
        raise NoLinearHeadError(f"{name} returned logits without a call of its base model: {_INSTEAD}")
    hidden: Tensor = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1].last_hidden_state
    hidden = hidden[:, -inputs["input_ids"].shape[1] :]
    if logits.shape[1] != 1:
        raise NoLinearHeadError(
            f"{name} returned logits of {logits.shape[1]} positions although logits_to_keep = 1: {_INSTEAD}"
        )
    if logits.numel():
        _compare(name, head, hidden[0, -1].detach(), logits[0, -1].detach())
    return hidden


@torch.no_grad()
def _compare(name: str, head: LinearHead, hidden: Tensor, logits: Tensor) -> None:
    """Raise unless logits [V] are the head's for hidden [D], within rounding. Large errors are looked for: a factor."""
    dtype = _head_dtype(head)
    expected = nn.functional.linear(hidden.to(dtype), head.weight.to(dtype)).float()
    expected = expected if head.bias is None else expected + head.bias
    expected = head.scale * expected
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    size = logits.float().nan_to_num(0.0, 0.0, 0.0).abs().max()
    tolerance = float(max(1e-2, 8 * torch.finfo(dtype).eps) * size)
    if expected.shape == logits.shape and torch.allclose(
        expected, logits.float(), rtol=0.0, atol=tolerance, equal_nan=True
    ):
        return
    if expected.shape != logits.shape:
        found = f"{logits.shape[0]} logits from a head of {expected.shape[0]} rows"
    else:
        found = f"logits that differ from it by up to {float((expected - logits).abs().max()):.3g}"
    raise NoLinearHeadError(
        f"the logits of {name} are not softcap(s (h W^T + b)) with s = {head.scale:g} and softcap = {head.softcap}: "
        f"the model returned {found}: {_INSTEAD}"
    )


def _head_dtype(head: LinearHead) -> torch.dtype:
    """The dtype that the model's own call of the head computes in."""
    device = head.weight.device.type
    if torch.is_autocast_enabled(device) and head.weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return head.weight.dtype
