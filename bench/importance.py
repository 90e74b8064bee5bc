"""importance_weights over groups: each prompt's samples are one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._case import OURS, Case, Contender, Family, Pass, Truth
from irlfast.ops import importance_weights
from irlfast.ops.importance import importance_weights_reference

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor], Outputs]

CASES = (
    Case(op="importance", line="E", work="self-normalised weights in groups", shape=(64, 8), dtype="float32"),
    Case(op="importance", line="E", work="self-normalised weights in groups", shape=(512, 64), dtype="float32"),
)


def weights(log_target: Tensor, log_proposal: Tensor) -> Outputs:
    """Of equal groups [G, K], which is all that a softmax over rows can do."""
    log_ratio = log_target - log_proposal
    found = log_ratio.softmax(dim=1)
    return found, log_ratio.logsumexp(dim=1) - math.log(log_ratio.shape[1]), 1 / found.square().sum(dim=1)


def passes(case: Case) -> Iterator[Pass]:
    """Forward. Groups are of one size, in order; ours is told each sample's group and could have them otherwise."""
    groups, samples = case.shape
    log_target, log_proposal = torch.randn(groups, samples), torch.randn(groups, samples)
    ids = torch.arange(groups).repeat_interleave(samples)

    def ours(log_target: Tensor, log_proposal: Tensor) -> Outputs:
        found = importance_weights(log_target.view(-1), log_proposal.view(-1), groups=ids)
        return found.weights.view(groups, samples), found.log_normalizer, found.ess

    forms: list[tuple[str, Family, Form]] = [
        (OURS, "ours", ours),
        ("eager", "eager", weights),
        ("torch.compile", "compile", torch.compile(weights, fullgraph=True, dynamic=False)),
    ]
    exact = importance_weights_reference(log_target.view(-1), log_proposal.view(-1), groups=ids)
    yield Pass(
        name="forward",
        contenders=[
            Contender(name=name, family=family, run=_forward(form, log_target, log_proposal))
            for name, family, form in forms
        ],
        bars={OURS: ()},
        truth=[
            Truth(name="weights", value=exact.weights.view(groups, samples)),
            Truth(name="log_normalizer", value=exact.log_normalizer),
            Truth(name="ess", value=exact.ess),
        ],
        tolerance=1e-4,
        nbytes=3 * log_target.nbytes,
        grad=False,
    )


def _forward(form: Form, log_target: Tensor, log_proposal: Tensor) -> Callable[[], Outputs]:
    return lambda: form(log_target, log_proposal)
