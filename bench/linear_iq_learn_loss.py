"""linear_iq_learn_loss: IQ-Learn from hidden states and head, forward and backward, against whole logits.

Shapes are tokens x depth x vocabulary; the tokens are sequences of 128, of which one in four was cut off: its last
reward is dropped, so that every row has a label, as in `linear_token_stats`' own case. What it costs is what that op
costs: the same products and the same bars. The op takes its turn in the same rounds, beside what eager PyTorch does in
its place: the gain over eager is to be at least what it is there, and the peak memory the same.
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
from bench.token_stats import LOGPROB
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
    # Eager's own peak depends on where the allocator finds room, by a third either way.
    Bar(kind="peak", against=STATISTICS, limit=1.02),
]
Form = Callable[[Tensor, Tensor], Tensor]


def whole_logits(labels: Tensor, ended: Tensor) -> Form:
    """The formula as one writes it in eager PyTorch; the value after EOS is 0."""
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[:, -1] = ended

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        q, value = logit_and_lse(hidden, weight, labels)
        rewards = q - GAMMA * torch.nn.functional.pad(value[:, 1:], (0, 1))
        return (value - q + LAMBDA * torch.where(counted, rewards, 0.0) ** 2).mean()

    return loss


def logit_and_lse(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of whole logits, in the order whose backward pass takes less memory."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    q = logits.gather(-1, labels[..., None]).squeeze(-1)
    return q, logits.logsumexp(-1)


def eager_logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor]:
    q, lse = logit_and_lse(hidden, weight, labels)
    return (q - lse,)


def ours(labels: Tensor, mask: Tensor, ended: Tensor, mode: str) -> Form:
    options: dict[str, Any] = {"gamma": GAMMA, "lambda_td": LAMBDA, "truncated": "drop", "mode": mode}
    return lambda hidden, weight: linear_iq_learn_loss(hidden, weight, labels, mask, ended=ended, **options).loss


def passes(case: Case) -> Iterator[Pass]:
    """Forward + backward to hidden states and head."""
    tokens, depth, vocab = case.shape
    length = min(LENGTH, tokens)
    batch = tokens // length
    hidden = (torch.randn(batch, length, depth) * (3 / depth**0.5)).to(case.torch_dtype).requires_grad_()
    weight = torch.randn(vocab, depth).to(case.torch_dtype).requires_grad_()
    labels = torch.randint(vocab, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.bool)
    ended = torch.arange(batch) % 4 != 0
    eager = whole_logits(labels, ended)
    modes = MODES["forward + dX + dW"]
    forms: list[tuple[str, Family, Form]] = [
        *((f"{OURS}, {mode}", "ours", ours(labels, mask, ended, mode)) for mode in ("keep", "recompute")),
        ("eager", "eager", eager),
        ("torch.compile", "compile", torch.compile(eager, fullgraph=True, dynamic=False)),
    ]
    flat = hidden.detach().reshape(-1, depth)
    of_statistics = {STATISTICS: statistics(LOGPROB, "keep"), EAGER_STATISTICS: eager_logprob}
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
                    family="yardstick",
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
        options: dict[str, Any] = {"gamma": GAMMA, "lambda_td": LAMBDA, "truncated": "drop", "denominator": count}
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
