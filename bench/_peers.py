"""Other libraries' ways to the same outputs, where they are installed and run on this machine.

`pip install --no-deps trl liger-kernel cut-cross-entropy triton` brings them; without --no-deps they may replace torch.
Each function returns forms by name, and reasons by the names of those that are missing.
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

LIGER = "Liger-Kernel"


def logprob_peers() -> Peers:
    """Forms of (logits [N, V], labels [N]) -> (logprob,)."""
    forms: dict[str, Form] = {
        "torch F.cross_entropy": lambda logits, labels: (
            -torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        )
    }
    missing = _liger()
    for name, function in _attributes("TRL", "trl.trainer.utils", missing, "selective_log_softmax"):
        forms[name] = lambda logits, labels, f=function: (f(logits, labels),)
    return forms, missing


def logprob_entropy_peers() -> Peers:
    """Forms of (logits [N, V], labels [N]) -> (logprob, entropy)."""
    forms: dict[str, Form] = {}
    missing = _liger()
    module = "trl.trainer.utils"
    for name, function in _attributes("TRL", module, missing, "selective_log_softmax_and_entropy"):
        forms[name] = lambda logits, labels, f=function: tuple(f(logits, labels))
    apart = _attributes("TRL", module, missing, "selective_log_softmax", "entropy_from_logits")
    if len(apart) == 2:
        (first, logprob), (_, entropy) = apart
        forms[f"{first} + entropy_from_logits"] = lambda logits, labels: (logprob(logits, labels), entropy(logits))
    return forms, missing


def linear_logprob_peers() -> Peers:
    """Forms of (hidden [N, D], weight [V, D], labels [N]) -> (logprob,)."""
    forms: dict[str, Form] = {}
    missing = _liger()
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        missing["torch F.linear_cross_entropy"] = f"torch {torch.__version__} has none, 2.13 does"
    else:
        forms["torch F.linear_cross_entropy"] = lambda hidden, weight, labels: (
            -fused(hidden, weight, labels, reduction="none"),
        )
    for name, function in _attributes("cut-cross-entropy", "cut_cross_entropy", missing, "linear_cross_entropy"):
        forms[f"{name} (torch_compile)"] = lambda hidden, weight, labels, f=function: (
            -f(hidden, weight, labels, reduction="none", impl="torch_compile"),
        )
    return forms, missing


def linear_logprob_entropy_peers() -> Peers:
    """Forms of (hidden [N, D], weight [V, D], labels [N]) -> (logprob, entropy)."""
    missing = _liger()
    forms: dict[str, Form] = {}
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
    except (ImportError, AttributeError) as problem:
        missing[peer] = f"not here: {problem}"
        return None
    return function


def _liger() -> dict[str, str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return {LIGER: "not installed"}
    return {LIGER: "its kernels are written in Triton and find no driver without a GPU"}
