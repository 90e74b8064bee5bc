"""linear_iq_learn_loss: IQ-Learn from hidden states and head, forward and backward, against whole logits.

Shapes are tokens x depth x vocabulary; the tokens are sequences of 128, of which one in four was cut off.
What it costs is what `linear_token_stats` costs: the same products and the same bars. That op takes its turn in
the same rounds, beside what eager PyTorch does in its place: the gain over eager is to be at least what it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from bench._ceilings import product_ceilings
from bench.linear_token_stats import MEMORY_BAR, MODES, SHAPES, run_both
from bench.linear_token_stats import ours as statistics
from bench.token_stats import FORMS, LOGPROB
from irlfast.losses import iq_learn_loss, linear_iq_learn_loss

TESTS = "tests/losses/test_iq_learn.py"
LENGTH, GAMMA, LAMBDA = 128, 0.99, 0.1
CASES = tuple(
    Case(op="linear_iq_learn_loss", line="IQ", work="loss", shape=SHAPES[0], dtype=dtype, mallocs=("tuned",))
    for dtype in ("float32", "bfloat16")
)
STATISTICS, EAGER_STATISTICS = "linear_token_stats, keep", "linear_token_stats in eager"
KEEP_BARS = [
    Bar(kind="speedup", against="eager", limit=1.0),
    Bar(kind="parity", against={STATISTICS: 1, EAGER_STATISTICS: 1}, limit=1.0),
]
Form = Callable[[Tensor, Tensor], Tensor]


def whole_logits(labels: Tensor, mask: Tensor, ended: Tensor) -> Form:
    """The formula as one writes it in eager PyTorch; the last column's value is that of no token."""
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    known = mask & ~(last & ended[:, None])

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight).float()
        value = logits.logsumexp(-1)
        q = logits.gather(-1, labels[..., None]).squeeze(-1)
        following = torch.where(known, torch.nn.functional.pad(value[:, 1:], (0, 1)), 0.0)
        terms = value - q + LAMBDA * (q - GAMMA * following) ** 2
        return torch.where(mask, terms, 0.0).sum() / mask.sum()

    return loss


def ours(labels: Tensor, mask: Tensor, ended: Tensor, mode: str) -> Form:
    options: dict[str, Any] = {"gamma": GAMMA, "lambda_td": LAMBDA, "mode": mode}
    return lambda hidden, weight: linear_iq_learn_loss(hidden, weight, labels, mask, ended=ended, **options).loss


def passes(case: Case) -> Iterator[Pass]:
    """Forward + backward to hidden states and head."""
    tokens, depth, vocab = case.shape
    length = min(LENGTH, tokens)
    batch = tokens // length
    hidden = (torch.randn(batch, length, depth) * (3 / depth**0.5)).to(case.torch_dtype).requires_grad_()
    weight = torch.randn(vocab, depth).to(case.torch_dtype).requires_grad_()
    labels = torch.randint(vocab, (batch, length))
    mask = (torch.arange(length) < length - 1).expand(batch, length)  # the last state follows the last token
    ended = torch.arange(batch) % 4 != 0
    eager = whole_logits(labels, mask, ended)
    modes = MODES["forward + dX + dW"]
    forms: list[tuple[str, Family, Form]] = [
        *((f"{OURS}, {mode}", "ours", ours(labels, mask, ended, mode)) for mode in ("keep", "recompute")),
        ("eager", "eager", eager),
        ("torch.compile", "compile", torch.compile(eager, fullgraph=True, dynamic=False)),
    ]
    flat = hidden.detach().reshape(-1, depth)
    whole = FORMS[LOGPROB]["lse form"]
    of_statistics = {
        STATISTICS: statistics(LOGPROB, "keep"),
        EAGER_STATISTICS: lambda hidden, weight, labels: whole(torch.nn.functional.linear(hidden, weight), labels),
    }
    leaves = [flat.clone().requires_grad_(), weight]
    upstream = (torch.randn(batch * length),)
    yield Pass(
        name="forward + dX + dW",
        contenders=[
            *(Contender(name=name, family=family, run=both(form, hidden, weight)) for name, family, form in forms),
            *product_ceilings(flat, weight.detach(), gradients=2),
            *(
                Contender(
                    name=name,
                    family="ceiling",
                    run=run_both(form, leaves[0], weight, labels.flatten(), upstream, leaves),
                )
                for name, form in of_statistics.items()
            ),
        ],
        bars={
            f"{OURS}, {mode}": [
                Bar(kind="overrun", against=modes[mode], limit=1.12),
                # Without the logits in memory they are made twice: that is paid for in time.
                *(KEEP_BARS if mode == "keep" else []),
                *([MEMORY_BAR] if case.dtype == "float32" else []),
            ]
            for mode in ("keep", "recompute")
        },
        truth=exact(hidden, weight, labels, mask, ended),
        tolerance=1e-3 if case.dtype == "float32" else 5e-2,
        flop=2 * batch * length * depth * vocab * 3,
    )


def both(form: Form, hidden: Tensor, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        loss = form(hidden, weight)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    return run


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, ended: Tensor) -> list[Truth]:
    """In float64, a sequence at a time: the loss, dX of the first sequence, dW of some labels' rows."""
    wide, chosen, count = weight.detach().double(), labels.flatten()[:64].unique(), int(mask.sum())
    rows = wide[chosen].requires_grad_()
    total, of_hidden, of_rows = torch.zeros((), dtype=torch.float64), [], torch.zeros_like(rows)
    for sequence in torch.arange(len(hidden)).split(1):
        leaf = hidden[sequence].detach().double().requires_grad_()
        logits = (leaf @ wide.T).index_copy(-1, chosen, leaf @ rows.T)
        q, lse = logits.gather(-1, labels[sequence, :, None])[..., 0], logits.logsumexp(-1)
        options: dict[str, Any] = {"gamma": GAMMA, "lambda_td": LAMBDA, "denominator": count}
        loss = iq_learn_loss(q, lse, mask[sequence], ended=ended[sequence], **options).loss
        dx, dw = torch.autograd.grad(loss, (leaf, rows))
        total += loss.detach()
        of_hidden.append(dx)
        of_rows += dw
    return [
        Truth(name="loss", value=total),
        Truth(name="dX", value=of_hidden[0], select=slice(0, 1)),
        Truth(name="dW", value=of_rows, select=chosen),
    ]
