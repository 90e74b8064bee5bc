"""Heads that are split over ranks, for the processes that run them and the tests that know what is right."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEPTH, VOCAB = 16, 5003
# Columns of each rank: uneven, one of a single column, cuts on and beside those of chunks.
CUTS = {2: [0, 2049, VOCAB], 4: [0, 10, 2058, 2059, VOCAB]}


@dataclass(frozen=True)
class Case:
    """A call on every rank of a group of `ranks`; `inputs` changes the batch."""

    ranks: int
    dtype: str = "float32"
    mode: str = "recompute"
    inputs: str = "ordinary"
    impl: str = "auto"
    op: str = "stats"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.mode != "frozen"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def part(self, rank: int) -> slice:
        cuts = CUTS[self.ranks]
        return slice(cuts[rank], cuts[rank + 1])


@dataclass(frozen=True)
class Batch:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    temperature: Tensor
    upstream: Tensor  # (5, N): of logprob, entropy, lse, reverse and forward KL


def batch(case: Case) -> Batch:
    """Nine rows; the second ignored, the third without a gradient, the others' labels all over the vocabulary."""
    generator = torch.Generator().manual_seed(len(case.inputs))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = 0 if case.inputs == "no rows" else 9
    hidden, weight, bias = randn(rows, DEPTH), randn(VOCAB, DEPTH) * 3 / DEPTH**0.5, randn(VOCAB)
    labels = torch.linspace(0, VOCAB - 1, rows).long()
    upstream = randn(5, rows)
    if rows:
        labels[1], upstream[:, 2] = case.options.get("ignore_index", -100), 0.0
    if case.inputs == "labels of one slice":
        labels = labels.where(labels < 0, labels % CUTS[case.ranks][1])
    if case.inputs == "a slice without probability":
        bias[case.part(case.ranks - 1)] = -math.inf
        labels = labels.where(labels < 0, labels % 1000)
    if case.inputs == "probability in the last column alone":
        bias[:-1] = -math.inf
        labels = labels.where(labels < 0, VOCAB - 1)
    if case.inputs == "all ignored":
        labels[:] = -100
    if case.inputs == "shifted":
        bias -= 150.0
    ref = randn(rows, DEPTH), weight + 0.1 * randn(VOCAB, DEPTH)
    numbers = torch.linspace(0.5, 1.5, rows, dtype=torch.float64)
    dtype = case.torch_dtype
    return Batch(
        *(t.to(dtype) for t in (hidden, weight, bias)), labels, *(t.to(dtype) for t in ref), numbers.float(), upstream
    )


CASES: dict[str, Case] = {
    f"{mode} {dtype} {ranks}": Case(ranks, dtype, mode, options={"softcap": 12.0, "temperatures": True})
    for ranks in (2, 4)
    for mode in ("recompute", "keep", "frozen")
    for dtype in ("float32", "float64", "bfloat16")
}
CASES |= {
    f"{inputs}, {mode}": Case(4, "float64", mode, inputs)
    for mode in ("recompute", "frozen")
    for inputs in (
        "labels of one slice",
        "a slice without probability",
        "probability in the last column alone",
        "all ignored",
        "no rows",
        "shifted",
    )
}
CASES |= {
    "positive ignore_index": Case(4, "float64", options={"ignore_index": 2058}),
    "reference": Case(4, "float64", impl="reference", options={"temperatures": True}),
    "pair float64": Case(4, "float64", op="pair", options={"softcap": 12.0, "temperatures": True}),
    "pair float32": Case(2, "float32", op="pair"),
    "pair, a slice without probability": Case(4, "float64", inputs="a slice without probability", op="pair"),
    "logits float64": Case(4, "float64", op="logits", options={"softcap": 12.0, "temperatures": True}),
    "logits float32": Case(2, op="logits"),
    "logits bfloat16": Case(4, "bfloat16", op="logits"),
    "logits, a slice without probability": Case(4, "float64", inputs="a slice without probability", op="logits"),
    "logits, all ignored": Case(4, "float64", inputs="all ignored", op="logits"),
    "pair, reference": Case(2, "float64", op="pair", impl="reference"),
}
