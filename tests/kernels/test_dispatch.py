"""Who gets the Triton kernels, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from irlfast.kernels._tuning import NARROW, TARGETS, config, table, target_name
from irlfast.ops import _triton, token_kl, token_stats


def test_importing_irlfast_imports_no_triton() -> None:
    code = "import sys, irlfast.ops, irlfast.losses; sys.exit(bool({'triton', 'irlfast.kernels'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_tensor_is_refused_with_the_reason() -> None:
    reason = "impl='triton' is not available: the tensor is on the CPU, where Triton can only interpret"
    with pytest.raises(RuntimeError, match=reason):
        token_stats(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), impl="triton")
    with pytest.raises(RuntimeError, match=reason):
        token_kl(torch.zeros(2, 5), torch.zeros(2, 5), impl="triton")


def test_float64_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"the tensor is torch\.float64, the kernel takes torch\.float32"):
        token_stats(torch.zeros(2, 5).double(), torch.zeros(2, dtype=torch.long), impl="triton")


def test_a_missing_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_INSTALLED", False)
    with pytest.raises(RuntimeError, match=r'Triton is not installed: pip install "irlfast\[gpu\]"'):
        token_stats(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), impl="triton")


@pytest.mark.parametrize("op", ["token_stats", "token_kl"])
@pytest.mark.parametrize("suffix", ["", "_backward", "_backward_"])
def test_every_op_has_a_kernel_for_gpus(op: str, suffix: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"irlfast::{op}{suffix}", "CUDA")


def test_gpu_tensors_take_the_registered_ops() -> None:
    """Traced with tensors that only claim to be on a GPU; their gradients take one."""
    with FakeTensorMode():
        logits, ref_logits = (torch.empty(4, 70, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        labels = torch.empty(4, device="cuda", dtype=torch.long)
        traced = make_fx(lambda x, r, y: (token_stats(x, y), token_kl(x, r)))(logits, ref_logits, labels)
    called = [node.target for node in traced.graph.nodes]
    for name in ("token_stats", "token_kl"):
        assert called.count(getattr(torch.ops.irlfast, name).default) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
def test_a_graph_is_not_broken_on_a_gpu() -> None:
    """What torch.compile captures of tensors that only claim to be on a GPU; running it takes one."""
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def statistics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return token_stats(x, y, temperature=0.7).logprob + token_kl(x, x * 2)

    with FakeTensorMode():
        statistics(torch.empty(4, 70, device="cuda"), torch.empty(4, device="cuda", dtype=torch.long))
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes]
    assert torch.ops.irlfast.token_stats in called or torch.ops.irlfast.token_stats.default in called


def test_every_target_has_its_own_entries() -> None:
    for operation in ("token_stats", "token_kl"):
        for target in TARGETS:
            for bytes_ in (2, 4):
                for vocab in (NARROW, NARROW + 1):
                    entry = config(operation, target, bytes_, vocab)
                    assert entry == table()[operation, target, bytes_, vocab <= NARROW]
                    # A block is whole loads of 16 bytes, at least one for each thread.
                    threads = entry.num_warps * (64 if target.startswith("gfx") else 32)
                    assert entry.block * bytes_ % (16 * threads) == 0


def test_other_gpus_fall_back() -> None:
    assert config("token_stats", "sm_103", 2, 128256) == config("token_stats", "sm_100", 2, 128256)
    assert config("token_stats", "sm_89", 2, 128256) == config("token_stats", "sm_80", 2, 128256)
    for target in ("sm_75", "gfx1100", ""):
        assert config("token_stats", target, 2, 128256).block == 1024
    assert target_name("cuda", 90) == "sm_90"
    assert target_name("hip", "gfx942:sramecc+:xnack-") == "gfx942"
