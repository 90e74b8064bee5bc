"""What code allocates and multiplies, seen op by op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {
    torch.ops.aten.mm.out: (0, 1),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm_.default: (1, 2),
    torch.ops.aten.mm.dtype_out: (0, 1),
    torch.ops.aten.addmm.dtype_out: (1, 2),
}
# Products of a GPU that write where they are told to, and for tensors that only claim to be there have no rule.
_IN_PLACE = (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made inside it.

    Attributes:
        sizes: of every allocation, in order.
        peak: the most that were alive at once.
        flop: of all matrix products.
    """

    def __init__(self, known: list[Tensor | None]) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.peak = self.flop = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in known:
            if tensor is not None:
                self._alive[tensor.untyped_storage()._cdata] = (StorageWeakRef(tensor.untyped_storage()), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            a, b = (args[place] for place in _PRODUCTS[func])
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        result = kwargs["out"] if func in _IN_PLACE else func(*args, **kwargs)
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.sizes.append(storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result
