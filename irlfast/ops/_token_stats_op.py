"""token_stats as torch.library ops, for torch.compile and whoever else traces: schemas, and the shapes returned.

What they compute, and the derivative, is registered in token_stats.py, beside the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from irlfast.ops._dispatch import LIBRARY, statistics_dtype

# logprob, entropy, lse and what the gradient needs of each row, [3, rows].
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

# Labels are int64, [...] or [..., K]; row_temperature, where given, replaces temperature, one a row, contiguous in the
# statistics' type; softcap 0 means none. Besides logprob it returns entropy and lse ([0] unless with_distribution), and
# state [3, rows], what the gradient needs of each row.
LIBRARY.define(
    "token_stats(Tensor logits, Tensor labels, Tensor? row_temperature, float temperature, float softcap, "
    "int ignore_index, bool with_distribution, bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "token_stats_backward(Tensor logits, Tensor labels, Tensor? row_temperature, float temperature, float softcap, "
    "int ignore_index, Tensor state, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse) -> Tensor"
)
LIBRARY.define(
    "token_stats_backward_(Tensor(a!) logits, Tensor labels, Tensor? row_temperature, float temperature, "
    "float softcap, int ignore_index, Tensor state, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse)"
    " -> ()"
)


def as_op(
    statistics: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]],
) -> Callable[..., Statistics]:
    """A forward pass as the registered op: always with the state, and a tensor [0] for what is not asked for.

    `inplace_backward` concerns autograd alone.
    """

    def forward(
        logits: Tensor,
        labels: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float,
        ignore_index: int,
        with_distribution: bool,
        inplace_backward: bool = False,
        **options: str,
    ) -> Statistics:
        logprob, entropy, lse, state = statistics(
            logits,
            labels,
            row_temperature,
            temperature,
            softcap,
            ignore_index,
            with_distribution,
            with_state=True,
            **options,
        )
        assert state is not None
        if entropy is None or lse is None:
            return logprob, logprob.new_empty(0), logprob.new_empty(0), state
        return logprob, entropy, lse, state

    return forward


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    with_distribution: bool,
    inplace_backward: bool,
) -> Statistics:
    dtype = statistics_dtype(logits.dtype)
    rows_shape = logits.shape[:-1]
    distribution_shape = rows_shape if with_distribution else (0,)
    return (
        labels.new_empty(labels.shape, dtype=dtype),
        logits.new_empty(distribution_shape, dtype=dtype),
        logits.new_empty(distribution_shape, dtype=dtype),
        logits.new_empty((3, math.prod(rows_shape)), dtype=dtype),
    )


def _backward_fake(logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _no_second_derivative(ctx: object, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "token_stats: the fused kernel has no second derivative; use impl='reference' where a gradient of the "
        "gradient is needed"
    )


torch.library.register_fake("irlfast::token_stats", _forward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_stats_backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("irlfast::token_stats_backward_", lambda *args: None, lib=LIBRARY)
torch.library.register_autograd("irlfast::token_stats_backward", _no_second_derivative, lib=LIBRARY)
