"""linear_token_stats: line D, statistics from hidden states and head, in each mode.

Shapes are rows x depth x vocabulary. Logits have a standard deviation of about 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import _peers
from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from bench._ceilings import product_ceilings
from bench.token_stats import BOTH, FORMS, LOGPROB, OUTPUTS, error_bars
from irlfast.ops import (
    TokenStats,
    linear_token_loss,
    linear_token_stats,
    linear_token_stats_reference,
    token_stats_reference,
)

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor, Tensor], Outputs]

SHAPES = ((1024, 768, 50304), (512, 1024, 151936))
LINEAR, FROZEN_HEAD = "linear ", ", frozen head"
# Where products dominate the allocator matters little: one setting. The larger shape takes long: less is asked of it.
CASES = tuple(
    Case(op="linear_token_stats", line="D", work=LINEAR + work, shape=shape, dtype=dtype, mallocs=("tuned",))
    for shape, works in ((SHAPES[0], (BOTH, LOGPROB)), (SHAPES[1], (BOTH, LOGPROB + FROZEN_HEAD)))
    for work in works
    for dtype in ("float32", "bfloat16")
)

FORWARD, DX, DW = "logits product", "dX product", "dW product"
# The bare products of forward + backward: "one pass" is linear_token_loss, for upstream gradients known beforehand; the
# frozen mode has its two for a gradient of the log-prob alone.
ONE_PASS = "one pass"
MODES: dict[str, dict[str, dict[str, int]]] = {
    "forward + dX": {
        "frozen": {FORWARD: 1, DX: 1},
        "keep": {FORWARD: 1, DX: 1},
        "recompute": {FORWARD: 2, DX: 1},
        ONE_PASS: {FORWARD: 1, DX: 1},
    },
    "forward + dX + dW": {
        "keep": {FORWARD: 1, DX: 1, DW: 1},
        "recompute": {FORWARD: 2, DX: 1, DW: 1},
        ONE_PASS: {FORWARD: 1, DX: 1, DW: 1},
    },
}
MEMORY_BAR = Bar(kind="extra_mib", limit=40)
CHECKED_ROWS = slice(0, 8)


def ours(work: str, mode: str, softcap: float | None = None) -> Form:
    order = slice(0, len(OUTPUTS[work]))
    options: dict[str, Any] = {"mode": mode, "softcap": softcap}
    return lambda hidden, weight, labels: tuple(linear_token_stats(hidden, weight, labels, **options)[order])


def rivals(work: str) -> tuple[list[tuple[str, Family, Form]], dict[str, str]]:
    """(name, family, form) of each rival, and those that are missing with the reason."""
    forms: list[tuple[str, Family, Form]] = []
    name, statistics = list(FORMS[work].items())[-1]  # the better form under torch.compile

    def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        return statistics(torch.nn.functional.linear(hidden, weight), labels)

    forms.append((f"eager, {name}", "eager", whole_logits))
    forms.append((f"torch.compile, {name}", "compile", torch.compile(whole_logits, fullgraph=True, dynamic=False)))
    peers, missing = _peers.linear_logprob_peers() if work == LOGPROB else _peers.linear_logprob_entropy_peers()
    forms.extend((peer, "peer", form) for peer, form in peers.items())
    return forms, missing


def passes(case: Case) -> Iterator[Pass]:
    """Forward; forward + dX in each mode, as with a frozen head; forward + dX + dW in each mode."""
    rows, depth, vocab = case.shape
    work = case.work.removeprefix(LINEAR).removesuffix(FROZEN_HEAD)
    hidden = (torch.randn(rows, depth) * (3 / depth**0.5)).to(case.torch_dtype)
    weight = torch.randn(vocab, depth).to(case.torch_dtype)
    labels = torch.randint(vocab, (rows,))
    upstream = tuple(torch.randn(rows) for _ in OUTPUTS[work])
    others, missing = rivals(work)
    flop = 2 * rows * depth * vocab
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    memory_bars = [MEMORY_BAR] if case.dtype == "float32" and case.shape == SHAPES[0] else []

    if work == BOTH:
        yield Pass(
            name="forward",
            contenders=[
                *(
                    Contender(name=name, family=family, run=run_forward(form, hidden, weight, labels))
                    for name, family, form in [(OURS, "ours", ours(work, "auto")), *others]
                ),
                *product_ceilings(hidden, weight, gradients=0),
            ],
            bars={
                OURS: [Bar(kind="overrun", against={FORWARD: 1}, limit=1.10), *memory_bars, *error_bars(OUTPUTS[work])]
            },
            truth=forward_truth(hidden, weight, labels, OUTPUTS[work]),
            tolerance=tolerance,
            skipped=missing,
            flop=flop,
            grad=False,
        )
    leaf = hidden.detach().requires_grad_()
    dx_truth = hidden_gradient_truth(hidden, weight, labels, upstream)
    for name, modes in MODES.items():
        if work == BOTH:
            modes = {mode: products for mode, products in modes.items() if mode != "frozen"}
        trained = name.endswith("dW")
        if trained and case.work.endswith(FROZEN_HEAD):
            return
        leaves = [leaf, weight.detach().requires_grad_()] if trained else [leaf]
        head = leaves[-1] if trained else weight
        arguments = (leaf, head, labels, upstream, leaves)
        runs: list[tuple[str, Family, Callable[[], Outputs]]] = [
            (
                f"{OURS}, {mode}",
                "ours",
                run_one_pass(*arguments) if mode == ONE_PASS else run_both(ours(work, mode), *arguments),
            )
            for mode in modes
        ]
        runs.extend((n, family, run_both(form, *arguments)) for n, family, form in others)
        yield Pass(
            name=name,
            contenders=[
                *(Contender(name=n, family=family, run=run) for n, family, run in runs),
                *product_ceilings(hidden, weight, gradients=len(leaves)),
            ],
            bars={
                f"{OURS}, {mode}": [
                    Bar(kind="overrun", against=products, limit=1.12),
                    *(memory_bars if mode in ("recompute", "frozen") else []),
                ]
                for mode, products in modes.items()
            },
            truth=[dx_truth, weight_gradient_truth(hidden, weight, labels, upstream)] if trained else [dx_truth],
            tolerance=tolerance,
            skipped=missing,
            flop=flop * (1 + len(leaves)),
        )


def run_forward(form: Form, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Outputs]:
    return lambda: form(hidden, weight, labels)


def run_both(
    form: Form, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Outputs, leaves: list[Tensor]
) -> Callable[[], Outputs]:
    def run() -> Outputs:
        values = form(hidden, weight, labels)
        return torch.autograd.grad(values, leaves, [g.to(v.dtype) for v, g in zip(values, upstream, strict=True)])

    return run


def run_one_pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    upstream: Outputs,
    leaves: list[Tensor],
    softcap: float | None = None,
) -> Callable[[], Outputs]:
    """The loss whose gradients with respect to the statistics are `upstream`."""

    def loss(stats: TokenStats, rows: Tensor) -> Tensor:
        return torch.stack([(g[rows] * value).sum() for g, value in zip(upstream, stats, strict=False)]).sum()

    return lambda: torch.autograd.grad(linear_token_loss(hidden, weight, labels, loss, softcap=softcap), leaves)


def forward_truth(
    hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...], softcap: float | None = None
) -> list[Truth]:
    """Every row, a few at a time: float64 needs much memory."""
    wide = weight.double()
    parts = [
        linear_token_stats_reference(x.double(), wide, y, softcap=softcap)
        for x, y in zip(hidden.split(64), labels.split(64), strict=True)
    ]
    return [Truth(name=name, value=torch.cat([getattr(part, name) for part in parts])) for name in outputs]


def hidden_gradient_truth(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Outputs, softcap: float | None = None
) -> Truth:
    leaf = hidden[CHECKED_ROWS].double().requires_grad_()
    exact = linear_token_stats_reference(leaf, weight.double(), labels[CHECKED_ROWS], softcap=softcap)[: len(upstream)]
    (value,) = torch.autograd.grad(exact, leaf, [g[CHECKED_ROWS].double() for g in upstream])
    return Truth(name="dX", value=value, select=CHECKED_ROWS)


def weight_gradient_truth(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Outputs, softcap: float | None = None
) -> Truth:
    """Some labels' rows of dW, which sum over all rows of the logits."""
    chosen = labels[:64].unique()
    wide = weight.double()
    leaf = wide[chosen].requires_grad_()
    value = torch.zeros_like(leaf)
    for rows in torch.arange(len(labels)).split(64):
        x = hidden[rows].double()
        logits = (x @ wide.T).index_copy(1, chosen, x @ leaf.T)
        exact = token_stats_reference(logits, labels[rows], softcap=softcap)[: len(upstream)]
        value += torch.autograd.grad(exact, leaf, [g[rows].double() for g in upstream])[0]
    return Truth(name="dW", value=value, select=chosen)
