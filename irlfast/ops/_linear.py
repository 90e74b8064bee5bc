"""The chunk loops of the linear ops: products over chunks of the vocabulary, and what is done with each chunk's logits.

Written once for every device. A device gives an `Epilogue`, which works on the logits of some columns while they are in
its cache; the products are `_product.product`; sizes and memory are those of a `_linear_plan.Plan`. Whoever calls has
left ignored rows out, unless the epilogue knows them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from irlfast.ops._linear_plan import Plan
from irlfast.ops._product import product


class Rows(NamedTuple):
    """What each row brings besides its logits."""

    labels: Tensor  # (N) int64
    row_temperature: Tensor | None  # (N) in the statistics' type; replaces temperature
    temperature: float
    softcap: float  # 0 means none
    ref_hidden: Tensor | None = None  # (N, D') of a reference model, where there is one

    def take(self, which: Tensor | slice) -> Rows:
        row_temperature = None if self.row_temperature is None else self.row_temperature[which]
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[which]
        return self._replace(labels=self.labels[which], row_temperature=row_temperature, ref_hidden=ref_hidden)

    def inverse_temperature(self) -> Tensor | float:
        """1 / T, (N) float64 where there is one a row."""
        return 1 / self.temperature if self.row_temperature is None else 1 / self.row_temperature.double()

    def slope(self, value: Tensor) -> Tensor | float:
        """dl / dlogit where the softcapped logit l is `value`: 1 - tanh^2."""
        return (1 - value / self.softcap) * (1 + value / self.softcap) if self.softcap else 1.0


class Upstream(NamedTuple):
    """Gradients of the statistics, (N) each in their type, None for zero."""

    logprob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    reverse_kl: Tensor | None = None  # of a reference model, as is the next
    forward_kl: Tensor | None = None

    def take(self, which: Tensor | slice) -> Upstream:
        return Upstream(*(None if g is None else g[which] for g in self))

    def nonzero(self) -> Tensor | None:
        """(N) bool, whether a row receives any gradient; None where all gradients are None."""
        given = [g != 0 for g in self if g is not None]  # NaN is not 0
        if not given:
            return None
        some = given[0]
        for other in given[1:]:
            some = some | other
        return some

    def nonzero_rows(self) -> Tensor | None:
        """Numbers of the rows that receive any gradient, None where all do or all gradients are None."""
        some = self.nonzero()
        return None if some is None or bool(some.all()) else some.nonzero().squeeze(1)


class Differentiates(Protocol):
    """The part of an `Epilogue` that backward needs."""

    def differentiate(
        self,
        logits: Tensor,
        first_column: int,
        rows: Rows,
        state: Tensor,
        upstream: Upstream,
        out: Tensor,
        *,
        row_numbers: Tensor | None,
    ) -> None:
        """out [n, C] = the gradient of the logits' rows row_numbers, or of all. state [4, n] as of `finish`."""


class Epilogue(Differentiates, Protocol):
    """A device's work on the logits [N, C] of columns first_column and on, adjacent in a row.

    Attributes:
        compacts: whether rows that are ignored, or receive no gradient, are left out before the products. On a GPU the
            host would wait to count them; there the epilogue itself makes their statistics and gradients 0.
    """

    compacts: bool

    def merge(self, logits: Tensor, first_column: int, rows: Rows, running: Tensor, *, weighted: bool) -> None:
        """Adds the columns to running [4, N] float64: maximum, others, weighted (where asked), the label's logit.

        The unit of weighted is the epilogue's own until the last columns are in.
        """

    def exponentials(self, logits: Tensor, first_column: int, rows: Rows, maximum: Tensor, out: Tensor) -> None:
        """out [N, C] = exp((l - maximum) / T) dl / dlogit; 0 at the label, and where the maximum [N] is -inf."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head: weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor, begin: int, end: int, out: Tensor, sums: Tensor | None = None) -> None:
        """out [N, end - begin] = the logits of columns [begin, end)."""
        if self.bias is not None:
            out.copy_(self.bias[begin:end].expand_as(out))
        product(hidden, self.weight[begin:end].t(), out, accumulate=self.bias is not None, sums=sums)


def matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns], contiguous, in the first elements of a flat tensor."""
    return memory[: rows * columns].view(rows, columns)


def sweep(
    hidden: Tensor,  # (N, D)
    head: Head,
    rows: Rows,
    epilogue: Epilogue,
    plan: Plan,
    *,
    weighted: bool,
    kept: Tensor | None = None,  # (>= N * V)
    expected: Tensor | None = None,  # (N, D)
) -> Tensor:  # (4, N)
    """Running statistics of all columns, by one product a chunk.

    kept receives the logits, each chunk [N, columns] after the one before. expected receives
    sum_{v != y} p_v (dl / dlogit)_v W_v, by one more product a chunk; what was summed before is rescaled where a row's
    maximum rises.
    """
    count = hidden.shape[0]
    running = plan.new("running", hidden)
    scratch, factors, sums = (plan.new(name, hidden) for name in ("logits", "factors", "sums"))
    assert running is not None
    running.zero_()[0].fill_(-torch.inf)
    for begin, end in plan.chunks(head.vocab):
        for which in plan.blocks(count):
            part, x = rows.take(which), hidden[which]
            if kept is not None:
                logits = matrix(kept[count * begin :], count, end - begin)[which]
            else:
                assert scratch is not None
                logits = matrix(scratch, len(x), end - begin)
            head.logits(x, begin, end, logits, sums)
            state = running[:, which]
            before = state[0].clone()
            epilogue.merge(logits, begin, part, state, weighted=weighted)
            if expected is None:
                continue
            out = logits if factors is None else matrix(factors, len(x), end - begin)
            epilogue.exponentials(logits, begin, part, state[0], out)
            if begin:
                rise = torch.where(state[0] > before, ((before - state[0]) * part.inverse_temperature()).exp(), 1.0)
                expected[which] *= rise.to(expected.dtype)[:, None]
            product(out, head.weight[begin:end], expected[which], accumulate=begin > 0, sums=sums)
    if expected is not None:
        expected /= (1 + running[1]).to(expected.dtype)[:, None]
    return running


class Finished(NamedTuple):
    """Statistics (N) each; state (4, N): maximum, others, entropy and label's logit. In the statistics' type."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    state: Tensor


def finish(running: Tensor, rows: Rows, dtype: torch.dtype) -> Finished:
    """The statistics that running ones amount to; the formulas of csrc/include/irlfast/online_softmax.h."""
    maximum, others, weighted, label = running
    inverse_temperature = rows.inverse_temperature()
    log_sum = (maximum - maximum) + others.log1p()  # NaN for a row without a finite maximum
    # The maximum is taken from the logit before the logarithm is: both are exact, their sum would not be.
    logprob = (label - maximum) * inverse_temperature - log_sum
    entropy = log_sum - weighted / (1 + others)
    lse = maximum * inverse_temperature + log_sum
    state = torch.stack([maximum, others, entropy, label]).to(dtype)
    return Finished(logprob.to(dtype), entropy.to(dtype), lse.to(dtype), state)


class Gradients(NamedTuple):
    """Where gradients go, None for those that nobody needs. hidden (N, D) and bias (V) in the statistics' type."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def pull(
    hidden: Tensor,  # (N, D)
    head: Head,
    rows: Rows,
    epilogue: Differentiates,
    plan: Plan,
    state: Tensor,  # (4, N)
    upstream: Upstream,
    gradients: Gradients,
    *,
    kept: Tensor | None = None,  # (>= M * V)
    kept_rows: int = 0,  # M
    row_numbers: Tensor | None = None,  # (N)
    add: bool = False,
) -> None:
    """Gradients of these N rows: logits anew or from `kept`, their gradient in place or beside them, and the products.

    row_numbers: where among the M rows of `kept` the N are. add: to what the weight's and bias's gradients hold.
    """
    count = hidden.shape[0]
    # Kept logits are not written over: backward may run again, and a block that stays in cache is quicker to write.
    scratch, factors, sums = (plan.new(name, hidden) for name in ("logits", "factors", "sums"))
    # Sums over several blocks are not rounded in between.
    chunk_of_weight = plan.new("weight gradient", hidden)
    for begin, end in plan.chunks(head.vocab):
        of_weight = None if gradients.weight is None else gradients.weight[begin:end]
        if of_weight is not None and chunk_of_weight is not None:
            of_weight = chunk_of_weight[: end - begin]
        for which in plan.blocks(count):
            part, x = rows.take(which), hidden[which]
            numbers = None if row_numbers is None else row_numbers[which]
            if kept is not None:
                logits = matrix(kept[kept_rows * begin :], kept_rows, end - begin)
                if numbers is None:
                    logits = logits[which]
            else:
                assert scratch is not None
                logits = matrix(scratch, len(x), end - begin)
                head.logits(x, begin, end, logits, sums)
            out = logits if factors is None else matrix(factors, len(x), end - begin)
            epilogue.differentiate(logits, begin, part, state[:, which], upstream.take(which), out, row_numbers=numbers)
            onto = add or which.start > 0
            if gradients.hidden is not None:
                product(out, head.weight[begin:end], gradients.hidden[which], accumulate=begin > 0, sums=sums)
            if of_weight is not None:
                product(out.t(), x, of_weight, accumulate=onto, sums=sums)
            if gradients.bias is not None:
                column_sums = out.sum(dim=0, dtype=gradients.bias.dtype)
                of_bias = gradients.bias[begin:end]
                of_bias.add_(column_sums) if onto else of_bias.copy_(column_sums)
        if chunk_of_weight is not None and gradients.weight is not None and of_weight is not None:
            gradients.weight[begin:end].copy_(of_weight)
