"""token_kl: line C, the exact divergence from a reference and the policy's gradient.

The reference is near the policy, as in training: its logits differ from the policy's by 0.3 in standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from bench._ceilings import bandwidth_ceilings
from bench.token_stats import GRADIENT_ROWS, IN_PLACE, Refilled
from irlfast.ops import token_kl, token_kl_reference

Form = Callable[[Tensor, Tensor], Tensor]

KINDS = {"reverse KL": "reverse", "forward KL": "forward", "Jensen-Shannon": "js"}
SHAPES = ((1024, 50304), (512, 151936))
CASES = (
    *(
        Case(op="token_kl", line="C", work="reverse KL", shape=shape, dtype=dtype)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Case(op="token_kl", line="C", work=work, shape=SHAPES[0], dtype="float32", mallocs=("tuned",))
        for work in ("forward KL", "Jensen-Shannon")
    ),
)
LARGEST_ERROR = 2e-7


def log_softmaxes(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)


def reverse_by_log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum exp(log p) (log p - log q)."""
    log_p, log_q = log_softmaxes(logits, ref_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_by_lse(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum softmax(z) (z - z') - lse + lse'."""
    z, ref_z = logits.float(), ref_logits.float()
    return (z.softmax(-1) * (z - ref_z)).sum(-1) - z.logsumexp(-1) + ref_z.logsumexp(-1)


def forward_by_log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return reverse_by_log_softmax(ref_logits, logits)


def forward_by_kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = log_softmaxes(logits, ref_logits)
    return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def js_by_logaddexp(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = log_softmaxes(logits, ref_logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def js_by_log_mixture(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = log_softmaxes(logits, ref_logits)
    p, q = log_p.exp(), log_q.exp()
    mixture = (p + q) / 2
    return ((p * log_p + q * log_q).sum(-1) - 2 * torch.xlogy(mixture, mixture).sum(-1)) / 2


FORMS: dict[str, dict[str, Form]] = {
    "reverse KL": {"log-softmax form": reverse_by_log_softmax, "lse form": reverse_by_lse},
    "forward KL": {"log-softmax form": forward_by_log_softmax, "kl_div form": forward_by_kl_div},
    "Jensen-Shannon": {"logaddexp form": js_by_logaddexp, "mixture form": js_by_log_mixture},
}


def ours(kind: Any, inplace: bool = False) -> Form:
    return lambda logits, ref_logits: token_kl(logits, ref_logits, kind=kind, inplace_backward=inplace)


def passes(case: Case) -> Iterator[Pass]:
    """Forward, and forward + backward with respect to the policy with a fresh gradient and in place."""
    rows, vocab = case.shape
    kind = KINDS[case.work]
    wide = torch.randn(rows, vocab) * 3
    logits = wide.to(case.torch_dtype)
    ref_logits = (wide + 0.3 * torch.randn(rows, vocab)).to(case.torch_dtype)
    del wide
    upstream = torch.randn(rows)
    forms: list[tuple[str, Family, Form]] = [(OURS, "ours", ours(kind))]
    for name, form in FORMS[case.work].items():
        forms.append((f"eager, {name}", "eager", form))
        forms.append((f"torch.compile, {name}", "compile", torch.compile(form, fullgraph=True, dynamic=False)))
    nbytes = logits.numel() * logits.element_size()
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    # Logarithms bound the Jensen-Shannon divergence, not memory: no bar but its error.
    bars = [
        Bar(kind="speedup", against="compile", limit=3),
        Bar(kind="speedup", against="eager", limit=7, malloc="tuned"),
    ]
    bars = [] if kind == "js" else bars
    yield Pass(
        name="forward",
        contenders=[
            *(Contender(name=n, family=family, run=run_forward(form, logits, ref_logits)) for n, family, form in forms),
            *bandwidth_ceilings("read", "copy", data=[logits, ref_logits]),
        ],
        bars={OURS: [*bars, Bar(kind="error", against="kl", limit=LARGEST_ERROR)]},
        truth=[forward_truth(logits, ref_logits, kind)],
        tolerance=tolerance,
        nbytes=2 * nbytes,
        grad=False,
    )
    leaf = logits.detach().requires_grad_()
    yield Pass(
        name="forward + backward",
        contenders=[
            *(Contender(name=n, family=fam, run=run_both(form, leaf, ref_logits, upstream)) for n, fam, form in forms),
            run_both_in_place(kind, logits, ref_logits, upstream),
        ],
        bars={OURS: bars, IN_PLACE: bars},
        truth=[gradient_truth(logits, ref_logits, upstream, kind)],
        tolerance=tolerance,
        nbytes=5 * nbytes,
    )


def forward_truth(logits: Tensor, ref_logits: Tensor, kind: str) -> Truth:
    """Every row, a few at a time: float64 needs much memory."""
    parts = [
        token_kl_reference(z.double(), r.double(), kind=kind)
        for z, r in zip(logits.split(64), ref_logits.split(64), strict=True)
    ]
    return Truth(name="kl", value=torch.cat(parts))


def gradient_truth(
    logits: Tensor, ref_logits: Tensor, upstream: Tensor, kind: str, rows: slice | Tensor = GRADIENT_ROWS
) -> Truth:
    leaf = logits[rows].double().requires_grad_()
    exact = token_kl_reference(leaf, ref_logits[rows].double(), kind=kind)
    (value,) = torch.autograd.grad(exact, leaf, upstream[rows].double())
    return Truth(name="gradient", value=value, select=rows)


def run_forward(form: Form, logits: Tensor, ref_logits: Tensor) -> Callable[[], tuple[Tensor]]:
    return lambda: (form(logits, ref_logits),)


def run_both(form: Form, leaf: Tensor, ref_logits: Tensor, upstream: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(form(leaf, ref_logits), leaf, upstream)


def run_both_in_place(kind: str, logits: Tensor, ref_logits: Tensor, upstream: Tensor) -> Contender:
    held, form = Refilled(logits), ours(kind, inplace=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(held.current, ref_logits), held.current, upstream)

    return Contender(name=IN_PLACE, family="ours", run=run, prepare=held.fill)
