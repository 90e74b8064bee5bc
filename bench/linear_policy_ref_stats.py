"""linear_policy_ref_stats: line D, policy and reference from hidden states and heads, both divergences included.

Shapes are rows x depth x vocabulary, of both models. Logits have a standard deviation of about 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._case import OURS, Bar, Case, Contender, Family, Pass, Truth
from bench._ceilings import product_ceilings
from bench.linear_token_stats import CHECKED_ROWS, DW, DX, FORWARD, MEMORY_BAR, SHAPES
from irlfast.ops import (
    PolicyRefStats,
    linear_policy_ref_stats,
    linear_policy_ref_stats_reference,
    token_kl_reference,
    token_stats_reference,
)

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Outputs]

WORK = "linear policy and reference statistics"
CASES = tuple(
    Case(op="linear_policy_ref_stats", line="D", work=WORK, shape=shape, dtype=dtype, mallocs=("tuned",))
    for shape in SHAPES
    for dtype in ("float32", "bfloat16")
)
# A log-prob and a penalty by each divergence, with an entropy bonus.
TRAINED = ("logprob", "entropy", "reverse_kl", "forward_kl")


def ours(*arguments: Tensor) -> Outputs:
    return linear_policy_ref_stats(*arguments)


def by_log_softmax(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor) -> Outputs:
    logits = torch.nn.functional.linear(hidden, weight).float()
    ref_logits = torch.nn.functional.linear(ref_hidden, ref_weight).float()
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return PolicyRefStats(
        log_p.gather(-1, labels[:, None]).squeeze(-1),
        -(p * log_p).sum(-1),
        logits.logsumexp(-1),
        log_q.gather(-1, labels[:, None]).squeeze(-1),
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
    )


def passes(case: Case) -> Iterator[Pass]:
    """Forward; forward + dX; forward + dX + dW."""
    rows, depth, vocab = case.shape
    hidden, weight = torch.randn(rows, depth) * (3 / depth**0.5), torch.randn(vocab, depth)
    ref_hidden = (hidden + 0.1 * torch.randn(rows, depth) * (3 / depth**0.5)).to(case.torch_dtype)
    hidden, weight = hidden.to(case.torch_dtype), weight.to(case.torch_dtype)
    labels = torch.randint(vocab, (rows,))
    inputs = (hidden, weight, ref_hidden, weight.clone(), labels)
    upstream = [torch.randn(rows) for _ in TRAINED]
    compiled = torch.compile(by_log_softmax, fullgraph=True, dynamic=False)
    forms: list[tuple[str, Family, Form]] = [
        (OURS, "ours", ours),
        ("eager, log-softmax form", "eager", by_log_softmax),
        ("torch.compile, log-softmax form", "compile", compiled),
    ]
    flop = 2 * rows * depth * vocab
    tolerance = 1e-3 if case.dtype == "float32" else 1e-1
    memory = [MEMORY_BAR] if case.dtype == "float32" and case.shape == SHAPES[0] else []
    yield Pass(
        name="forward",
        contenders=[
            *(Contender(name=name, family=family, run=run_forward(form, inputs)) for name, family, form in forms),
            *product_ceilings(hidden, weight, gradients=0),
        ],
        bars={OURS: [Bar(kind="overrun", against={FORWARD: 2}, limit=1.10), *memory]},
        truth=forward_truth(*inputs),
        tolerance=tolerance,
        flop=2 * flop,
        grad=False,
    )
    leaf = hidden.detach().requires_grad_()
    head = weight.detach().requires_grad_()
    for name, leaves, products in (
        ("forward + dX", [leaf], {FORWARD: 4, DX: 1}),
        ("forward + dX + dW", [leaf, head], {FORWARD: 4, DX: 1, DW: 1}),
    ):
        arguments = (leaf, head if len(leaves) > 1 else weight, *inputs[2:])
        yield Pass(
            name=name,
            contenders=[
                *(
                    Contender(name=n, family=family, run=run_both(form, arguments, upstream, leaves))
                    for n, family, form in forms
                ),
                *product_ceilings(hidden, weight, gradients=len(leaves)),
            ],
            bars={OURS: [Bar(kind="overrun", against=products, limit=1.12), *memory]},
            truth=[
                hidden_gradient_truth(inputs, upstream),
                *([weight_gradient_truth(inputs, upstream)] if len(leaves) > 1 else []),
            ],
            tolerance=tolerance,
            flop=flop * (4 + len(leaves)),
        )


def run_forward(form: Form, inputs: tuple[Tensor, ...]) -> Callable[[], Outputs]:
    return lambda: form(*inputs)


def run_both(
    form: Form, arguments: tuple[Tensor, ...], upstream: list[Tensor], leaves: list[Tensor]
) -> Callable[[], Outputs]:
    def run() -> Outputs:
        stats = PolicyRefStats(*form(*arguments))
        return torch.autograd.grad([getattr(stats, name) for name in TRAINED], leaves, upstream)

    return run


def forward_truth(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor
) -> list[Truth]:
    """Every row, a few at a time: float64 needs much memory."""
    wide, ref_wide = weight.double(), ref_weight.double()
    parts = [
        linear_policy_ref_stats_reference(x.double(), wide, r.double(), ref_wide, y)
        for x, r, y in zip(hidden.split(64), ref_hidden.split(64), labels.split(64), strict=True)
    ]
    return [Truth(name=name, value=torch.cat([getattr(p, name) for p in parts])) for name in PolicyRefStats._fields]


def hidden_gradient_truth(inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> Truth:
    hidden, weight, ref_hidden, ref_weight, labels = inputs
    leaf = hidden[CHECKED_ROWS].double().requires_grad_()
    exact = linear_policy_ref_stats_reference(
        leaf, weight.double(), ref_hidden[CHECKED_ROWS].double(), ref_weight.double(), labels[CHECKED_ROWS]
    )
    outputs = [getattr(exact, name) for name in TRAINED]
    (value,) = torch.autograd.grad(outputs, leaf, [g[CHECKED_ROWS].double() for g in upstream])
    return Truth(name="dX", value=value, select=CHECKED_ROWS)


def weight_gradient_truth(inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> Truth:
    """Some labels' rows of dW, which sum over all rows of the logits."""
    hidden, weight, ref_hidden, ref_weight, labels = inputs
    chosen = labels[:64].unique()
    wide, ref_wide = weight.double(), ref_weight.double()
    leaf = wide[chosen].requires_grad_()
    value = torch.zeros_like(leaf)
    for rows in torch.arange(len(labels)).split(64):
        x = hidden[rows].double()
        logits = (x @ wide.T).index_copy(1, chosen, x @ leaf.T)
        ref_logits = ref_hidden[rows].double() @ ref_wide.T
        stats = token_stats_reference(logits, labels[rows])
        divergences = [token_kl_reference(logits, ref_logits, kind=kind) for kind in ("reverse", "forward")]
        exact = [stats.logprob, stats.entropy, *divergences]
        value += torch.autograd.grad(exact, leaf, [g[rows].double() for g in upstream])[0]
    return Truth(name="dW", value=value, select=chosen)
