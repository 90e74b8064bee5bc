"""Other libraries' ways to the same outputs, where they are installed and run on this machine.

`pip install --no-deps trl liger-kernel cut-cross-entropy triton` brings them (on a GPU also quack-kernels and verl);
without --no-deps they may replace torch. Each function takes the device, as some have kernels for GPUs alone, and
returns forms by name, and reasons by the names of those that are missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Form = Callable[..., Outputs]
Peers = tuple[dict[str, Form], dict[str, str]]

LIGER, QUACK, VERL = "Liger-Kernel", "quack", "verl"
# What writes the gradient over its logits in forward already: it gets a copy, and has no backward pass of its own.
OVERWRITES_LOGITS = (f"{LIGER} liger_cross_entropy",)


def logprob_peers(device: str = "cpu") -> Peers:
    """Forms of (logits [N, V], labels [N]) -> (logprob,)."""
    forms: dict[str, Form] = {
        "torch F.cross_entropy": lambda logits, labels: (
            -torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        )
    }
    missing: dict[str, str] = {}
    for name, function in _attributes("TRL", "trl.trainer.utils", missing, "selective_log_softmax"):
        forms[name] = lambda logits, labels, f=function: (f(logits, labels),)
    for name, function in [
        *_on_gpu(device, LIGER, "liger_kernel", "liger_kernel.transformers.functional", missing, "liger_cross_entropy"),
        *_on_gpu(device, QUACK, "quack", "quack.cross_entropy", missing, "cross_entropy"),
    ]:
        forms[name] = lambda logits, labels, f=function: (-f(logits, labels, reduction="none"),)
    return forms, missing


def logprob_entropy_peers(device: str = "cpu") -> Peers:
    """Forms of (logits [N, V], labels [N]) -> (logprob, entropy)."""
    forms: dict[str, Form] = {}
    missing = dict.fromkeys((LIGER, QUACK), "does not give the entropy of given logits")
    module = "trl.trainer.utils"
    for name, function in _attributes("TRL", module, missing, "selective_log_softmax_and_entropy"):
        forms[name] = lambda logits, labels, f=function: tuple(f(logits, labels))
    apart = _attributes("TRL", module, missing, "selective_log_softmax", "entropy_from_logits")
    if len(apart) == 2:
        (first, logprob), (_, entropy) = apart
        forms[f"{first} + entropy_from_logits"] = lambda logits, labels: (logprob(logits, labels), entropy(logits))
    return forms, missing


def linear_logprob_peers(device: str = "cpu", softcap: float | None = None) -> Peers:
    """Forms of (hidden [N, D], weight [V, D], labels [N]) -> (logprob,)."""
    forms: dict[str, Form] = {}
    missing = {QUACK: "its linear cross-entropy gives a mean or a sum, not one log-prob a row"}
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        missing["torch F.linear_cross_entropy"] = f"torch {torch.__version__} has none, 2.13 does"
    elif softcap is not None:
        missing["torch F.linear_cross_entropy"] = "does not take a softcap"
    else:
        forms["torch F.linear_cross_entropy"] = lambda hidden, weight, labels: (
            -fused(hidden, weight, labels, reduction="none"),
        )
    for name, function in _attributes("cut-cross-entropy", "cut_cross_entropy", missing, "linear_cross_entropy"):
        for impl in ("torch_compile",) if device == "cpu" else ("cce", "cce_exact"):
            forms[f"{name} ({impl})"] = lambda hidden, weight, labels, f=function, impl=impl: (
                -f(hidden, weight, labels, reduction="none", impl=impl, softcap=softcap),
            )
    module = "liger_kernel.transformers.functional"
    for name, function in _on_gpu(device, LIGER, "liger_kernel", module, missing, "liger_fused_linear_cross_entropy"):
        forms[name] = lambda hidden, weight, labels, f=function: (
            -f(hidden, weight, labels, reduction="none", softcap=softcap),
        )
    return forms, missing


def linear_logprob_entropy_peers(device: str = "cpu", softcap: float | None = None) -> Peers:
    """Forms of (hidden [N, D], weight [V, D], labels [N]) -> (logprob, entropy)."""
    missing = {LIGER: "its linear cross-entropy does not give an entropy"}
    forms: dict[str, Form] = {}
    if softcap is not None:
        return forms, {
            **missing,
            "TRL ChunkedLogProbFunction": "not asked for a softcap",
            VERL: "does not take a softcap",
        }
    module = "verl.utils.kernel.linear_cross_entropy"
    for name, function in _on_gpu(device, VERL, "verl", module, missing, "linear_cross_entropy"):
        forms[name] = lambda hidden, weight, labels, f=function: tuple(f(hidden, weight, labels, 1.0, "none")[:2])
    for name, function in _attributes("TRL", "trl.kernels", missing, "ChunkedLogProbFunction"):
        forms[name] = lambda hidden, weight, labels, f=function: tuple(
            f.apply(hidden, weight, None, labels, 1.0, 4096, None, 1.0, ("entropy",))[:2]
        )
    return forms, missing


def _attributes(
    library: str, module: str, missing: dict[str, str], *names: str
) -> list[tuple[str, Callable[..., Any]]]:
    """The named functions; why there are none goes into `missing`."""
    return [
        (f"{library} {name}", function)
        for name in names
        if (function := _attribute(f"{library} {name}", module, name, missing)) is not None
    ]


def _attribute(peer: str, module: str, name: str, missing: dict[str, str]) -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as problem:  # a library that looks for a GPU or a compiler on import may raise anything
        missing[peer] = f"not here: {problem}"
        return None
    return function


def _on_gpu(
    device: str, library: str, package: str, module: str, missing: dict[str, str], name: str
) -> list[tuple[str, Callable[..., Any]]]:
    """The function of a library whose kernels run on GPUs alone, if this is one; else the library is missing."""
    if importlib.util.find_spec(package) is None:
        missing[library] = "not installed"
        return []
    if device == "cpu":
        missing[library] = "its kernels are for GPUs and find no driver without one"
        return []
    return _attributes(library, module, missing, name)
