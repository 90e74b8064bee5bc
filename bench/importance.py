"""importance_weights over groups, each prompt's samples being one: of equal size, and ragged."""

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

EQUAL, RAGGED = "self-normalised weights in groups", "self-normalised weights in ragged groups"
SHAPES = ((64, 8), (512, 64))  # groups x samples (ragged: on average)
CASES = tuple(
    Case(op="importance", line="E", work=work, shape=shape, dtype="float32")
    for work in (EQUAL, RAGGED)
    for shape in SHAPES
)


def by_rows(groups: int) -> Form:
    """A softmax over rows, which is all that equal groups in order need."""

    def form(log_target: Tensor, log_proposal: Tensor) -> Outputs:
        log_ratio = (log_target - log_proposal).view(groups, -1)
        weights = log_ratio.softmax(dim=1)
        log_normalizer = log_ratio.logsumexp(dim=1) - math.log(log_ratio.shape[1])
        return weights.view(-1), log_normalizer, 1 / weights.square().sum(dim=1)

    return form


def by_scatter(ids: Tensor, groups: int) -> Form:
    """Groups of any size, in any order."""

    def form(log_target: Tensor, log_proposal: Tensor) -> Outputs:
        log_ratio = log_target - log_proposal
        zeros = log_ratio.new_zeros(groups)
        top = log_ratio.new_full((groups,), -math.inf).scatter_reduce(0, ids, log_ratio, "amax")
        shares = (log_ratio - top[ids]).exp()
        total = zeros.index_add(0, ids, shares)
        counts = zeros.index_add(0, ids, torch.ones_like(log_ratio))
        weights = shares / total[ids]
        return weights, top + (total / counts).log(), 1 / zeros.index_add(0, ids, weights.square())

    return form


def passes(case: Case) -> Iterator[Pass]:
    """Forward."""
    groups, samples = case.shape
    ids = torch.arange(groups).repeat_interleave(samples)
    if case.work == RAGGED:
        ids = torch.cat([torch.arange(groups), torch.randint(groups, (groups * (samples - 1),))])[
            torch.randperm(len(ids))
        ]
    log_target, log_proposal = torch.randn(len(ids)), torch.randn(len(ids))
    form = by_rows(groups) if case.work == EQUAL else by_scatter(ids, groups)

    def ours(log_target: Tensor, log_proposal: Tensor) -> Outputs:
        return tuple(importance_weights(log_target, log_proposal, groups=ids))

    forms: list[tuple[str, Family, Form]] = [
        (OURS, "ours", ours),
        ("eager", "eager", form),
        ("torch.compile", "compile", torch.compile(form, fullgraph=True, dynamic=False)),
    ]
    exact = importance_weights_reference(log_target, log_proposal, groups=ids)
    yield Pass(
        name="forward",
        contenders=[
            Contender(name=name, family=family, run=_forward(form, log_target, log_proposal))
            for name, family, form in forms
        ],
        bars={OURS: ()},
        truth=[Truth(name=name, value=value) for name, value in exact._asdict().items()],
        tolerance=1e-4,
        nbytes=3 * log_target.nbytes,
        grad=False,
    )


def _forward(form: Form, log_target: Tensor, log_proposal: Tensor) -> Callable[[], Outputs]:
    return lambda: form(log_target, log_proposal)
