"""Work that bounds every contender: reading, copying or updating as many bytes, and bare matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench._case import Contender


def bandwidth_ceilings(*names: str, data: Sequence[Tensor]) -> list[Contender]:
    """Those of "read", "copy" and "update" (in place) that are named, over as many bytes as `data` has.

    What is read and copied is `data` itself: how fast memory is depends on the pages it happened to be given. An update
    has a buffer of its own. Copies and updates move the bytes twice.
    """
    sources = [_words(tensor) for tensor in data]
    nbytes = sum(words.nbytes for words in sources)
    destinations = [torch.zeros_like(words) for words in sources] if "copy" in names else []
    buffer = torch.ones(nbytes // 4 if "update" in names else 0)
    runs = {
        "read": lambda: tuple(words.sum() for words in sources),
        "copy": lambda: tuple(to.copy_(words) for to, words in zip(destinations, sources, strict=True)),
        "update": lambda: (buffer.neg_(),),
    }
    return [
        Contender(name=name, family="ceiling", run=runs[name], nbytes=nbytes * (1 if name == "read" else 2))
        for name in names
    ]


def _words(tensor: Tensor) -> Tensor:
    """Its memory as float32, whatever it holds; without the last bytes where they are fewer than a word has."""
    flat = tensor.detach().view(-1)
    return flat[: flat.numel() // 2 * 2].view(torch.float32)


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
