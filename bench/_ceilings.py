"""Work that bounds every contender: reading, copying or updating as many bytes, and bare matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from bench._case import Contender


def bandwidth_ceilings(*names: str, nbytes: int) -> list[Contender]:
    """Those of "read", "copy" and "update" (in place) that are named, over a mapped buffer of `nbytes`.

    Copies and updates move twice `nbytes`.
    """
    elements = max(1, nbytes // 4)
    buffer = torch.ones(elements)
    destination = torch.zeros(elements) if "copy" in names else buffer
    runs = {
        "read": lambda: (buffer.sum(),),
        "copy": lambda: (destination.copy_(buffer),),
        "update": lambda: (buffer.neg_(),),
    }
    return [
        Contender(name=name, family="ceiling", run=runs[name], nbytes=nbytes * (1 if name == "read" else 2))
        for name in names
    ]


def product_ceilings(hidden: Tensor, weight: Tensor, *, gradients: int) -> list[Contender]:
    """The bare products of a linear head, into mapped outputs of the operands' type.

    Args:
        hidden: [N, D]. weight: [V, D].
        gradients: 0 for the product of forward alone, 1 with that for dX, 2 with that for dW too.
    """
    logits = hidden @ weight.T
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight if gradients > 1 else weight[:0])
    runs = {
        "logits product": lambda: (torch.mm(hidden, weight.T, out=logits),),
        "dX product": lambda: (torch.mm(logits, weight, out=grad_hidden),),
        "dW product": lambda: (torch.mm(logits.T, hidden, out=grad_weight),),
    }
    return [Contender(name=name, family="ceiling", run=run) for name, run in [*runs.items()][: gradients + 1]]
