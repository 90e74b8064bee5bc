"""Peers take part where they are installed, and are named with the reason where they are not."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch

from bench import _peers

LOGITS, LABELS = torch.randn(5, 7), torch.tensor([0, 6, 3, 2, 2])


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(_peers.importlib, "import_module", lambda name: refuse(name, fromlist=("x",)))
    monkeypatch.setattr(_peers.importlib.util, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)


def test_missing_peers_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "trl", "cut_cross_entropy", "liger_kernel")
    for peers, names in (
        (_peers.logprob_peers, {"TRL selective_log_softmax", "Liger-Kernel"}),
        (_peers.logprob_entropy_peers, {"TRL selective_log_softmax_and_entropy", "Liger-Kernel"}),
        (_peers.linear_logprob_peers, {"cut-cross-entropy linear_cross_entropy", "Liger-Kernel"}),
        (_peers.linear_logprob_entropy_peers, {"TRL ChunkedLogProbFunction", "Liger-Kernel"}),
    ):
        forms, missing = peers()
        assert names <= set(missing)
        assert not names & set(forms)
        assert all("not" in reason or "No module" in reason for reason in missing.values())


def test_the_form_of_torch_itself_is_right() -> None:
    forms, _ = _peers.logprob_peers()
    (found,) = forms["torch F.cross_entropy"](LOGITS, LABELS)
    torch.testing.assert_close(found, LOGITS.log_softmax(-1)[torch.arange(5), LABELS])


def test_the_linear_form_of_torch_itself_is_right_or_missing() -> None:
    forms, missing = _peers.linear_logprob_peers()
    name = "torch F.linear_cross_entropy"
    if name in missing:
        assert not hasattr(torch.nn.functional, "linear_cross_entropy")
        return
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    (found,) = forms[name](hidden, weight, LABELS)
    torch.testing.assert_close(found, (hidden @ weight.T).log_softmax(-1)[torch.arange(5), LABELS])


def test_libraries_for_gpus_take_part_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called as its own function takes it, and gives a log-prob where it has a loss."""
    calls: list[dict[str, Any]] = []

    def stand_in(*args: Any, **options: Any) -> Any:
        calls.append(options)
        value = torch.full((5,), 2.0)
        return (value, value + 1) if args[-1] == "none" else value

    class Module:
        def __init__(self, name: str) -> None:
            pass

        def __getattr__(self, function: str) -> Any:
            return stand_in

    monkeypatch.setattr(_peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_peers.importlib, "import_module", Module)
    forms, _ = _peers.logprob_peers("cuda")
    for name in ("Liger-Kernel liger_cross_entropy", "quack cross_entropy"):
        (logprob,) = forms[name](LOGITS, LABELS)
        assert torch.equal(logprob, torch.full((5,), -2.0))
        assert calls[-1] == {"reduction": "none"}
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    forms, missing = _peers.linear_logprob_peers("cuda", softcap=30.0)
    for impl in ("cce", "cce_exact"):
        forms[f"cut-cross-entropy linear_cross_entropy ({impl})"](hidden, weight, LABELS)
        assert calls[-1] == {"reduction": "none", "softcap": 30.0, "impl": impl}
    assert "Liger-Kernel liger_fused_linear_cross_entropy" in forms
    forms, _ = _peers.linear_logprob_entropy_peers("cuda")
    logprob, entropy = forms["verl linear_cross_entropy"](hidden, weight, LABELS)
    assert (float(logprob[0]), float(entropy[0])) == (2.0, 3.0)  # a log-prob already
    # Installed, but without a GPU to run on.
    forms, missing = _peers.logprob_peers("cpu")
    assert "find no driver" in missing["Liger-Kernel"]
    assert not any("Liger" in name or "quack" in name for name in forms)
