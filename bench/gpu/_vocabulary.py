"""Passes of token_stats and token_kl on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import _peers
from bench._case import OURS, Bar, Contender, Family, Pass
from bench.gpu._cases import GpuCase
from bench.gpu._cost import BACKWARD, BOTH_PASSES, FORWARD, costs
from bench.gpu._inputs import (
    RIVAL_BARS,
    TOLERANCES,
    Targets,
    copy_ceiling,
    edge_rows,
    make_targets,
    only,
    with_softcap,
)
from bench.token_kl import FORMS as KL_FORMS
from bench.token_kl import KINDS
from bench.token_kl import forward_truth as kl_forward_truth
from bench.token_kl import gradient_truth as kl_gradient_truth
from bench.token_kl import ours as our_kl
from bench.token_stats import (
    FORMS,
    IN_PLACE,
    LOGPROB,
    OUTPUTS,
    Form,
    Outputs,
    forward_truth,
    gradient_truth,
    ours,
    run_backward_in_place,
    run_both,
    run_both_in_place,
    run_forward,
)

# Below it a row of programs does not fill the GPU, and launches count.
LARGE = 8192 * 128256
SHARE = Bar(kind="share", against={"copy": 1}, limit=0.9)
Named = list[tuple[str, Family, Form, Tensor]]  # with the labels that it can take


def token_stats_passes(case: GpuCase, device: str) -> Iterator[Pass]:
    """Forward, backward and both; the last two also with the gradient in place."""
    rows, vocab = case.shape
    logits = (torch.randn(rows, vocab, device=device) * case.std).to(case.torch_dtype)
    outputs = OUTPUTS[case.outputs]
    targets = make_targets(case, vocab, len(outputs), device)
    forms, missing = _forms(case, targets, device)
    moved = costs(case)
    tolerance = TOLERANCES[case.dtype]
    large = rows * vocab >= LARGE and case.dtype == "bfloat16" and not case.masked
    shares = [SHARE] if large else []

    nbytes = int(moved[FORWARD, ""].nbytes)
    yield Pass(
        name=FORWARD,
        contenders=[
            *(_forward(n, family, form, logits, labels) for n, family, form, labels in forms),
            copy_ceiling(nbytes, device),
        ],
        bars={OURS: [*shares, *RIVAL_BARS]},
        truth=only(targets.kept, forward_truth(logits, targets.labels, outputs, case.softcap)),
        tolerance=tolerance,
        skipped=missing,
        nbytes=nbytes,
        grad=False,
    )
    leaf = logits.detach().requires_grad_()
    truth = [gradient_truth(logits, targets.labels, targets.upstream, edge_rows(rows, device), case.softcap)]
    in_place = (ours(case.outputs, inplace=True, softcap=case.softcap), logits, targets.labels, targets.upstream)
    nbytes = int(moved[BACKWARD, ""].nbytes)
    apart = [entry for entry in forms if entry[0] not in _peers.OVERWRITES_LOGITS]
    no_backward = {n: "its forward is its backward" for n, *_ in forms if n in _peers.OVERWRITES_LOGITS}
    yield Pass(
        name=BACKWARD,
        contenders=[
            *(_backward(n, family, form, leaf, labels, targets.upstream) for n, family, form, labels in apart),
            run_backward_in_place(*in_place),
            copy_ceiling(nbytes, device),
        ],
        bars={OURS: [*shares, *RIVAL_BARS], IN_PLACE: [*shares, *RIVAL_BARS]},
        truth=truth,
        tolerance=tolerance,
        skipped={**missing, **no_backward},
        nbytes=nbytes,
    )
    nbytes = int(moved[BOTH_PASSES, ""].nbytes)
    yield Pass(
        name=BOTH_PASSES,
        contenders=[
            *(_both(n, family, form, leaf, labels, targets.upstream) for n, family, form, labels in forms),
            run_both_in_place(*in_place),
            copy_ceiling(nbytes, device),
        ],
        bars={OURS: RIVAL_BARS, IN_PLACE: RIVAL_BARS},
        truth=truth,
        tolerance=tolerance,
        skipped=missing,
        nbytes=nbytes,
    )


def _forms(case: GpuCase, targets: Targets, device: str) -> tuple[Named, dict[str, str]]:
    """Contenders, of the two forms of each formula the one that torch.compile makes more of."""
    name, form = list(FORMS[case.outputs].items())[-1]
    form = with_softcap(form, case.softcap)
    compiled = torch.compile(form, fullgraph=True, dynamic=False)
    forms: Named = [
        (OURS, "ours", ours(case.outputs, softcap=case.softcap), targets.labels),
        (f"eager, {name}", "eager", form, targets.plain),
        (f"torch.compile, {name}", "compile", compiled, targets.plain),
    ]
    peers, missing = (_peers.logprob_peers if case.outputs == LOGPROB else _peers.logprob_entropy_peers)(device)
    if case.softcap is not None:
        return forms, {**missing, **dict.fromkeys(peers, "not asked for a softcap")}
    # Only cross entropies know labels to ignore.
    forms += [(n, "peer", f, targets.labels if "cross_entropy" in n else targets.plain) for n, f in peers.items()]
    return forms, missing


def _forward(name: str, family: Family, form: Form, logits: Tensor, labels: Tensor) -> Contender:
    if name in _peers.OVERWRITES_LOGITS:
        copy = Copied(logits)
        return Contender(name=name, family=family, run=lambda: form(copy.buffer, labels), prepare=copy.fill)
    return Contender(name=name, family=family, run=run_forward(form, logits, labels))


def _both(name: str, family: Family, form: Form, leaf: Tensor, labels: Tensor, upstream: Outputs) -> Contender:
    if name in _peers.OVERWRITES_LOGITS:
        copy = Copied(leaf)
        return Contender(name=name, family=family, run=run_both(form, copy.buffer, labels, upstream), prepare=copy.fill)
    return Contender(name=name, family=family, run=run_both(form, leaf, labels, upstream))


class Copied:
    """A leaf like another, filled with its values again before each run."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self.buffer = torch.empty_like(source).requires_grad_(source.requires_grad)

    def fill(self) -> None:
        with torch.no_grad():
            self.buffer.copy_(self._source)


def _backward(name: str, family: Family, form: Form, leaf: Tensor, labels: Tensor, upstream: Outputs) -> Contender:
    values: list[Outputs] = []

    def prepare() -> None:
        values[:] = [form(leaf, labels)]

    def run() -> Outputs:
        (recorded,) = values
        return torch.autograd.grad(recorded, leaf, [g.to(v.dtype) for v, g in zip(recorded, upstream, strict=True)])

    return Contender(name=name, family=family, run=run, prepare=prepare)


def token_kl_passes(case: GpuCase, device: str) -> Iterator[Pass]:
    """Forward and both, the gradient with respect to the policy."""
    rows, vocab = case.shape
    kind = KINDS[case.outputs]
    logits = (torch.randn(rows, vocab, device=device) * case.std).to(case.torch_dtype)
    ref_logits = logits + (0.3 * torch.randn(rows, vocab, device=device)).to(case.torch_dtype)
    upstream = torch.randn(rows, device=device)
    name, form = next(iter(KL_FORMS[case.outputs].items()))
    forms: list[tuple[str, Family, Callable[[Tensor, Tensor], Tensor]]] = [
        (OURS, "ours", our_kl(kind)),
        (f"eager, {name}", "eager", form),
        (f"torch.compile, {name}", "compile", torch.compile(form, fullgraph=True, dynamic=False)),
    ]
    moved = costs(case)
    nbytes = int(moved[FORWARD, ""].nbytes)
    yield Pass(
        name=FORWARD,
        contenders=[
            *(Contender(name=n, family=family, run=_kl(f, logits, ref_logits)) for n, family, f in forms),
            copy_ceiling(nbytes, device),
        ],
        bars={OURS: RIVAL_BARS},
        truth=[kl_forward_truth(logits, ref_logits, kind)],
        tolerance=TOLERANCES[case.dtype],
        nbytes=nbytes,
        grad=False,
    )
    leaf = logits.detach().requires_grad_()
    nbytes = int(moved[BOTH_PASSES, ""].nbytes)
    yield Pass(
        name=BOTH_PASSES,
        contenders=[
            *(Contender(name=n, family=fam, run=_kl_both(f, leaf, ref_logits, upstream)) for n, fam, f in forms),
            copy_ceiling(nbytes, device),
        ],
        bars={OURS: RIVAL_BARS},
        truth=[kl_gradient_truth(logits, ref_logits, upstream, kind, edge_rows(rows, device))],
        tolerance=TOLERANCES[case.dtype],
        nbytes=nbytes,
    )


def _kl(form: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ref_logits: Tensor) -> Callable[[], Outputs]:
    return lambda: (form(logits, ref_logits),)


def _kl_both(
    form: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, ref_logits: Tensor, upstream: Tensor
) -> Callable[[], Outputs]:
    return lambda: torch.autograd.grad(form(leaf, ref_logits), leaf, upstream)
