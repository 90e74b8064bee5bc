"""What a kernel reads and writes, counted in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor


class Traffic:
    """Launches, and the addresses that they touched."""

    def __init__(self, allowed: Tensor | None) -> None:
        self.launches = 0
        self._allowed = allowed
        self._accesses: dict[str, list[tuple[np.ndarray, int]]] = {"read": [], "written": []}

    def read(self, tensor: Tensor) -> int:
        """Bytes read from the tensor's storage; twice read is counted twice."""
        return self._count("read", tensor)

    def written(self, tensor: Tensor) -> int:
        """Bytes written to the tensor's storage."""
        return self._count("written", tensor)

    def written_in_all(self) -> int:
        """Bytes written, wherever."""
        return sum(addresses.size * size for addresses, size in self._accesses["written"])

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses, kept = np.broadcast_arrays(pointers.data, mask.data)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if self._allowed is not None and size == self._allowed.element_size():
            assert self._within(self._allowed, addresses[kept]).all(), "an access outside the tensor"
        self._accesses[kind].append((addresses[kept], size))

    def _count(self, kind: str, tensor: Tensor) -> int:
        return sum(int(self._within(tensor, addresses).sum()) * size for addresses, size in self._accesses[kind])

    @staticmethod
    def _within(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
        storage = tensor.untyped_storage()
        return (addresses >= storage.data_ptr()) & (addresses < storage.data_ptr() + storage.nbytes())


@contextmanager
def count_traffic(allowed: Tensor | None = None) -> Iterator[Traffic]:
    """Within it, what kernels do is counted. Elements of the size of `allowed`'s are refused outside its storage."""
    from triton.runtime import interpreter

    traffic = Traffic(allowed)
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    launch = interpreter.GridExecutor.__call__

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.add("read", pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.add("written", pointers, mask)
        return store(pointers, value, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches += 1
        return launch(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_launch
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store
        interpreter.GridExecutor.__call__ = launch
