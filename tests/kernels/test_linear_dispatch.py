"""Who gets the Triton kernels of the linear ops, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from irlfast.ops import linear_policy_ref_stats, linear_token_loss, linear_token_stats


def statistics(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_token_stats(hidden, weight, labels, **options).logprob


def loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_token_loss(hidden, weight, labels, lambda stats, rows: stats.logprob.sum(), **options)


def pair(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_policy_ref_stats(hidden, weight, hidden, weight, labels, **options).reverse_kl


@pytest.mark.parametrize("run", [statistics, loss, pair])
def test_cpu_tensors_and_float64_are_refused_with_the_reason(run: Callable[..., Tensor]) -> None:
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="the tensor is on the CPU, where Triton can only interpret"):
        run(hidden, weight, labels, impl="triton")
    with pytest.raises(RuntimeError, match=r"the tensor is torch\.float64, the kernel takes torch\.float32"):
        run(hidden.double(), weight.double(), labels, impl="triton")


def test_products_inside_are_tritons_alone() -> None:
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(
        RuntimeError, match="mode='fused' takes impl='triton', which is not available: the tensor is on"
    ):
        statistics(hidden, weight, labels, mode="fused")
    with pytest.raises(RuntimeError, match="impl='triton' is not available: the tensor is on the CPU"):
        statistics(hidden, weight, labels, mode="fused", impl="triton")
    for impl in ("cpu", "cuda", "reference"):
        with pytest.raises(ValueError, match=f"mode='fused' with impl='{impl}', which has no such mode"):
            statistics(hidden, weight, labels, mode="fused", impl=impl)
    with pytest.raises(ValueError, match="impl='cuda9' is unknown"):
        statistics(hidden, weight, labels, mode="fused", impl="cuda9")


@pytest.mark.parametrize("op", ["linear_token_stats", "linear_policy_ref_stats"])
@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_every_op_has_a_kernel_for_gpus(op: str, suffix: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"irlfast::{op}{suffix}", "CUDA")


def test_gpu_tensors_take_the_registered_ops() -> None:
    """Traced with tensors that only claim to be on a GPU; their gradients take one."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (4, 70))
        labels = torch.empty(4, device="cuda", dtype=torch.long)
        traced = make_fx(lambda x, w, y: (statistics(x, w, y), pair(x, w, y), statistics(x, w, y, mode="fused")))(
            hidden, weight, labels
        )
    called = [node.target for node in traced.graph.nodes]
    assert called.count(torch.ops.irlfast.linear_token_stats.default) == 2
    assert called.count(torch.ops.irlfast.linear_policy_ref_stats.default) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_a_graph_is_not_broken_on_a_gpu() -> None:
    """What torch.compile captures of tensors that only claim to be on a GPU; running it takes one."""
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, w, y: statistics(x, w, y) + pair(x, w, y), fullgraph=True, backend=keep)
    with FakeTensorMode():
        compiled(*(torch.empty(n, 8, device="cuda") for n in (4, 70)), torch.empty(4, device="cuda", dtype=torch.long))
    called = [str(node.target) for node in graphs[0].graph.nodes]
    for name in ("linear_token_stats", "linear_policy_ref_stats"):
        assert sum(name in target for target in called) >= 1
