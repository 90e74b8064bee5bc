"""sequence_logprobs, and with importance_weights what a max-entropy step asks of its samples: line E."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from irlfast.ops import importance_weights, sequence_logprobs
from irlfast.ops.importance import importance_weights_reference
from irlfast.ops.sequence import sequence_logprobs_reference

Outputs = tuple[Tensor, ...]
Form = Callable[..., Outputs]

SUMS = "sequence log-prob"
WEIGHTS = "sequence log-prob and self-normalised weights"
CASES = tuple(Case(op="sequence", line="E", work=work, shape=(64, 512), dtype="float32") for work in (SUMS, WEIGHTS))
BARS = (Bar(kind="speedup", against="eager", limit=7), Bar(kind="speedup", against="compile", limit=2))


def sums(logprobs: Tensor, mask: Tensor) -> Outputs:
    return ((logprobs * mask).sum(dim=1),)


def sums_and_weights(logprobs: Tensor, mask: Tensor, log_proposal: Tensor) -> Outputs:
    total = (logprobs * mask).sum(dim=1)
    log_ratio = total - log_proposal
    weights = log_ratio.softmax(dim=0)
    log_normalizer = log_ratio.logsumexp(dim=0, keepdim=True) - math.log(len(log_ratio))
    return total, weights, log_normalizer, 1 / weights.square().sum(dim=0, keepdim=True)


def our_sums(logprobs: Tensor, mask: Tensor) -> Outputs:
    return (sequence_logprobs(logprobs, mask),)


def our_sums_and_weights(logprobs: Tensor, mask: Tensor, log_proposal: Tensor) -> Outputs:
    total = sequence_logprobs(logprobs, mask)
    return total, *importance_weights(total, log_proposal)


def passes(case: Case) -> Iterator[Pass]:
    """Forward; of the sums also forward + backward. Lengths are uniform in [1, T]; all sequences are one group."""
    batch, length = case.shape
    logprobs = -torch.rand(batch, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    exact = sequence_logprobs_reference(logprobs.double(), mask)
    log_proposal = (exact + torch.randn(batch)).float()
    upstream = torch.randn(batch)

    arguments: tuple[Tensor, ...] = (logprobs, mask)
    truth = [Truth(name="total", value=exact)]
    forms: tuple[Form, Form] = (our_sums, sums)
    if case.work == WEIGHTS:
        arguments = (*arguments, log_proposal)
        weights = importance_weights_reference(exact, log_proposal)
        truth += [Truth(name=name, value=value) for name, value in weights._asdict().items()]
        forms = our_sums_and_weights, sums_and_weights
    yield Pass(
        name="forward",
        contenders=[
            Contender(name=name, family=family, run=_forward(form, arguments))
            for name, family, form in _contenders(*forms)
        ],
        bars={OURS: BARS if case.work == WEIGHTS else ()},
        truth=truth,
        tolerance=1e-4,
        nbytes=logprobs.nbytes + mask.nbytes,
        grad=False,
    )
    if case.work == SUMS:
        leaf = logprobs.detach().requires_grad_()
        yield Pass(
            name="forward + backward",
            contenders=[
                Contender(name=name, family=family, run=_both(form, leaf, mask, upstream))
                for name, family, form in _contenders(*forms)
            ],
            bars={OURS: ()},
            truth=[Truth(name="gradient", value=mask.double() * upstream[:, None])],
            tolerance=1e-4,
            nbytes=2 * (logprobs.nbytes + mask.nbytes),
        )


def _contenders(ours: Form, form: Form) -> list[tuple[str, Family, Form]]:
    return [
        (OURS, "ours", ours),
        ("eager", "eager", form),
        ("torch.compile", "compile", torch.compile(form, fullgraph=True, dynamic=False)),
    ]


def _forward(form: Form, arguments: tuple[Tensor, ...]) -> Callable[[], Outputs]:
    return lambda: form(*arguments)


def _both(form: Form, leaf: Tensor, mask: Tensor, upstream: Tensor) -> Callable[[], Outputs]:
    return lambda: torch.autograd.grad(form(leaf, mask)[0], leaf, upstream)
