"""token_stats and token_logprobs: lines A (log-prob), B (log-prob and entropy) and the overhead of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import _peers
from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from bench._ceilings import bandwidth_ceilings
from irlfast.ops import token_logprobs, token_stats, token_stats_reference

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor], Outputs]

IN_PLACE = "irlfast, gradient in place"
LOGPROB, BOTH = "log-prob", "log-prob and entropy"
OUTPUTS = {LOGPROB: ("logprob",), BOTH: ("logprob", "entropy")}

SHAPES = ((1024, 50304), (512, 151936), (2048, 32000), (256, 262144))
DTYPES = ("float32", "bfloat16")
CASES = (
    *(
        Case(op="token_stats", line=line, work=work, shape=shape, dtype=dtype)
        for line, work in (("A", LOGPROB), ("B", BOTH))
        for shape in SHAPES
        for dtype in DTYPES
    ),
    *(
        Case(op="token_stats", line="overhead", work=work, shape=(4, 64), dtype="float32", mallocs=("tuned",))
        for work in (LOGPROB, BOTH)
    ),
)

LARGEST_ERRORS = {"logprob": 1e-6, "entropy": 7e-7}
GRADIENT_ROWS = slice(0, 8)


def logprob_gathered(logits: Tensor, labels: Tensor) -> Outputs:
    return (logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1),)


def logprob_less_lse(logits: Tensor, labels: Tensor) -> Outputs:
    wide = logits.float()
    return (wide.gather(-1, labels[:, None]).squeeze(-1) - wide.logsumexp(-1),)


def entropy_by_softmax(logits: Tensor, labels: Tensor) -> Outputs:
    """lse - sum softmax(z) z."""
    wide = logits.float()
    lse = wide.logsumexp(-1)
    logprob = wide.gather(-1, labels[:, None]).squeeze(-1) - lse
    return logprob, lse - (wide.softmax(-1) * wide).sum(-1)


def entropy_by_p_log_p(logits: Tensor, labels: Tensor) -> Outputs:
    """- sum p log p."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


FORMS: dict[str, dict[str, Form]] = {
    LOGPROB: {"log-softmax form": logprob_gathered, "lse form": logprob_less_lse},
    BOTH: {"softmax form": entropy_by_softmax, "p log p form": entropy_by_p_log_p},
}


def ours(work: str, inplace: bool = False, softcap: float | None = None) -> Form:
    options: dict[str, Any] = {"inplace_backward": inplace, "softcap": softcap}
    if work == LOGPROB:
        return lambda logits, labels: (token_logprobs(logits, labels, **options),)
    return lambda logits, labels: tuple(token_stats(logits, labels, **options)[:2])


def speedup_bars(case: Case, name: str) -> list[Bar]:
    # The one entry whose measured rivals leave less than 3 to any kernel that reads its logits once.
    low = (case.line, case.shape, case.dtype, name) == ("A", (1024, 50304), "float32", "forward")
    return [
        Bar(kind="speedup", against="compile", limit=2.4 if low else 3),
        Bar(kind="speedup", against="eager", limit=3 if case.line == "A" else 7, malloc="tuned"),
    ]


def error_bars(outputs: tuple[str, ...]) -> list[Bar]:
    return [Bar(kind="error", against=output, limit=LARGEST_ERRORS[output]) for output in outputs]


def rivals(case: Case) -> tuple[list[tuple[str, Family, Form]], dict[str, str]]:
    """(name, family, form) of each rival, and those that are missing with the reason."""
    forms: list[tuple[str, Family, Form]] = []
    for name, form in FORMS[case.work].items():
        forms.append((f"eager, {name}", "eager", form))
        forms.append((f"torch.compile, {name}", "compile", torch.compile(form, fullgraph=True, dynamic=False)))
    peers, missing = _peers.logprob_peers() if case.work == LOGPROB else _peers.logprob_entropy_peers()
    forms.extend((name, "peer", form) for name, form in peers.items())
    return forms, missing


def passes(case: Case) -> Iterator[Pass]:
    """Forward; forward + backward, with fresh gradients and in place; the backward pass in place alone."""
    rows, vocab = case.shape
    logits = (torch.randn(rows, vocab) * 3).to(case.torch_dtype)
    labels = torch.randint(vocab, (rows,))
    outputs = OUTPUTS[case.work]
    upstream = tuple(torch.randn(rows) for _ in outputs)
    others, missing = rivals(case)
    forms: list[tuple[str, Family, Form]] = [(OURS, "ours", ours(case.work)), *others]
    small = case.line == "overhead"
    nbytes = logits.numel() * logits.element_size()
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2  # peers that compute in 16 bits come close to it

    forward_bars = [*error_bars(outputs)] if small else [*speedup_bars(case, "forward"), *error_bars(outputs)]
    if not small:
        shares = ((0.9, False),) if case.dtype == "float32" else ((0.65, False), (0.8, True))
        forward_bars += [Bar(kind="share", against={"read": 1}, limit=share, further=f) for share, f in shares]
    yield Pass(
        name="forward",
        contenders=[
            *(Contender(name=n, family=family, run=run_forward(form, logits, labels)) for n, family, form in forms),
            *([] if small else bandwidth_ceilings("read", "copy", data=[logits])),
        ],
        bars={OURS: forward_bars},
        truth=forward_truth(logits, labels, outputs),
        tolerance=tolerance,
        skipped=missing,
        nbytes=nbytes,
        grad=False,
    )
    leaf = logits.detach().requires_grad_()
    if small:
        yield Pass(
            name="forward, recorded for backward",
            contenders=[Contender(name=n, family=family, run=run_forward(f, leaf, labels)) for n, family, f in forms],
            bars={OURS: [Bar(kind="seconds", limit=12e-6)]},
            truth=forward_truth(logits, labels, outputs),
            tolerance=tolerance,
            skipped=missing,
        )

    truth = gradient_truth(logits, labels, upstream)
    contenders = [Contender(name=n, family=fam, run=run_both(f, leaf, labels, upstream)) for n, fam, f in forms]
    bars = {OURS: [] if small else speedup_bars(case, "forward + backward")}
    if not small:
        contenders.append(run_both_in_place(ours(case.work, inplace=True), logits, labels, upstream))
        bars[IN_PLACE] = bars[OURS]
    yield Pass(
        name="forward + backward",
        contenders=contenders,
        bars=bars,
        truth=[truth],
        tolerance=tolerance,
        skipped=missing,
        nbytes=3 * nbytes,
    )
    if not small:
        share = [Bar(kind="share", against={"update": 1}, limit=0.85)] if case.dtype == "float32" else []
        yield Pass(
            name="backward in place",
            contenders=[
                run_backward_in_place(ours(case.work, inplace=True), logits, labels, upstream),
                *bandwidth_ceilings("update", data=[logits]),
            ],
            bars={IN_PLACE: share},
            truth=[truth],
            tolerance=tolerance,
            nbytes=2 * nbytes,
        )


def forward_truth(
    logits: Tensor, labels: Tensor, outputs: tuple[str, ...], softcap: float | None = None
) -> list[Truth]:
    """Every row, a few at a time: float64 needs much memory."""
    parts = [
        token_stats_reference(z.double(), y, softcap=softcap)
        for z, y in zip(logits.split(64), labels.split(64), strict=True)
    ]
    return [Truth(name=name, value=torch.cat([getattr(part, name) for part in parts])) for name in outputs]


def gradient_truth(
    logits: Tensor,
    labels: Tensor,
    upstream: Outputs,
    rows: slice | Tensor = GRADIENT_ROWS,
    softcap: float | None = None,
) -> Truth:
    leaf = logits[rows].double().requires_grad_()
    exact = token_stats_reference(leaf, labels[rows], softcap=softcap)[: len(upstream)]
    (value,) = torch.autograd.grad(exact, leaf, [g[rows].double() for g in upstream])
    return Truth(name="gradient", value=value, select=rows)


def run_forward(form: Form, logits: Tensor, labels: Tensor) -> Callable[[], Outputs]:
    return lambda: form(logits, labels)


def run_both(form: Form, leaf: Tensor, labels: Tensor, upstream: Outputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        values = form(leaf, labels)
        return torch.autograd.grad(values, leaf, [g.to(v.dtype) for v, g in zip(values, upstream, strict=True)])

    return run


class Refilled:
    """Logits that are no leaf, as a model's are; filled again before each run, as the gradient overwrites them."""

    def __init__(self, logits: Tensor) -> None:
        self.source = logits
        self.buffer = torch.empty_like(logits)
        self.fill()

    def fill(self) -> None:
        self.current = self.buffer.detach().copy_(self.source).requires_grad_().view_as(self.buffer)


def run_both_in_place(form: Form, logits: Tensor, labels: Tensor, upstream: Outputs) -> Contender:
    held = Refilled(logits)

    def run() -> Outputs:
        return torch.autograd.grad(form(held.current, labels), held.current, upstream)

    return Contender(name=IN_PLACE, family="ours", run=run, prepare=held.fill)


def run_backward_in_place(form: Form, logits: Tensor, labels: Tensor, upstream: Outputs) -> Contender:
    held = Refilled(logits)
    values: list[Outputs] = []

    def prepare() -> None:
        held.fill()
        values[:] = [form(held.current, labels)]

    return Contender(
        name=IN_PLACE,
        family="ours",
        run=lambda: torch.autograd.grad(values[0], held.current, upstream),
        prepare=prepare,
    )
