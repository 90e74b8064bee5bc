"""Large results lie in blocks that keep their pages, up to a limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from irlfast import ops
from irlfast.memory import WARM_FROM, set_warm_memory_limit, warm_empty, warm_memory_held

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    gc.collect()
    set_warm_memory_limit(0)
    set_warm_memory_limit(512 * MIB)
    yield
    set_warm_memory_limit(512 * MIB)


def test_a_released_block_is_used_again_for_about_its_size() -> None:
    first = warm_empty((3, 2 * MIB), torch.float32)  # 24 MiB
    place = first.data_ptr()
    assert place % (2 * MIB) == 0
    view = first[1:, :5]
    del first
    assert warm_memory_held() == 0  # a view still uses it
    del view
    assert warm_memory_held() == 24 * MIB
    assert warm_empty((4 * MIB,), torch.bfloat16).data_ptr() != place  # 8 MiB: too small for it
    again = warm_empty((11, MIB), torch.bfloat16)  # 22 MiB
    assert again.data_ptr() == place
    assert again.shape == (11, MIB)
    assert again.dtype == torch.bfloat16
    assert again.is_contiguous()


def test_two_tensors_never_share_a_block() -> None:
    tensors = [warm_empty((2 * MIB,), torch.float32).fill_(i) for i in range(4)]
    assert [float(t.sum()) for t in tensors] == [i * 2.0 * MIB for i in range(4)]


def test_what_is_over_the_limit_goes_back_the_oldest_first() -> None:
    set_warm_memory_limit(20 * MIB)
    a, b = warm_empty((2 * MIB,), torch.float32), warm_empty((3 * MIB,), torch.float32)
    c = warm_empty((6 * MIB,), torch.float32)
    kept = b.data_ptr()
    del a, b
    assert warm_memory_held() == 20 * MIB
    del c  # 24 MiB: more than may be kept
    assert warm_memory_held() == 0
    set_warm_memory_limit(30 * MIB)
    b = warm_empty((3 * MIB,), torch.float32)
    kept = b.data_ptr()
    del b
    assert warm_empty((3 * MIB,), torch.float32).data_ptr() == kept
    set_warm_memory_limit(0)
    assert warm_memory_held() == 0
    with pytest.raises(ValueError, match="limit is -1"):
        set_warm_memory_limit(-1)


def test_small_tensors_are_torchs_own() -> None:
    small = warm_empty((WARM_FROM // 4 - 1,), torch.float32)
    del small
    assert warm_memory_held() == 0


def test_a_gradient_that_is_kept_is_not_written_over_by_the_next() -> None:
    logits = torch.randn(64, 20000, requires_grad=True)
    labels = torch.arange(64)
    (first,) = torch.autograd.grad(ops.token_logprobs(logits, labels).sum(), logits)
    before = first.clone()
    (second,) = torch.autograd.grad((2 * ops.token_logprobs(logits, labels)).sum(), logits)
    assert torch.equal(first, before)
    assert torch.equal(second, 2 * first)
    place = second.data_ptr()
    del second
    (third,) = torch.autograd.grad(ops.token_logprobs(logits, labels).sum(), logits)
    assert third.data_ptr() == place
    assert torch.equal(third, first)
