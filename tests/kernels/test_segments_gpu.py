"""The segment kernels as torch sees them on a GPU: never waited for, captured in graphs, traced, checked as ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.ops import gae, importance_weights, policy_terms, sequence_logprobs

pytestmark = pytest.mark.gpu

ROWS, WIDTH = 5, 40
Inputs = dict[str, Tensor]


def make_inputs() -> Inputs:
    """All on the GPU, so that no call has to bring anything there."""
    generator = torch.Generator().manual_seed(0)
    names = ("logprobs", "old", "ref", "rollout", "entropy", "advantages")
    inputs = {name: torch.randn(ROWS, WIDTH, generator=generator) for name in names}
    for name in ("old", "rollout"):
        inputs[name] = inputs["logprobs"] + 0.1 * inputs[name]
    inputs["mask"] = torch.rand(ROWS, WIDTH, generator=generator) > 0.2
    inputs["offsets"] = torch.arange(0, ROWS * WIDTH + 1, WIDTH, dtype=torch.int32)
    inputs["denominator"] = torch.tensor(9.0)
    return {name: x.cuda() for name, x in inputs.items()}


def _policy(x: Inputs) -> tuple[Tensor, ...]:
    return policy_terms(
        x["logprobs"],
        x["advantages"],
        x["mask"],
        term="ppo",
        old_logprobs=x["old"],
        ref_logprobs=x["ref"],
        rollout_logprobs=x["rollout"],
        entropy=x["entropy"],
        kl_coef=0.1,
        entropy_coef=0.1,
        tis_cap=1.2,
        denominator=x["denominator"],
    )


def _gspo(x: Inputs) -> tuple[Tensor, ...]:
    flat = {name: x[name].reshape(-1) for name in ("logprobs", "advantages", "mask", "old")}
    return policy_terms(
        flat["logprobs"],
        flat["advantages"],
        flat["mask"],
        cu_seqlens=x["offsets"],
        term="gspo",
        old_logprobs=flat["old"],
        aggregation="seq_mean_token_mean",
    )


def _gae(x: Inputs) -> tuple[Tensor, ...]:
    return gae(x["advantages"], x["ref"], x["mask"])


def _sequences(x: Inputs) -> tuple[Tensor, ...]:
    return (
        sequence_logprobs(x["logprobs"], x["mask"], reduction="mean"),
        sequence_logprobs(x["logprobs"].reshape(-1), cu_seqlens=x["offsets"]),
    )


def _weights(x: Inputs) -> tuple[Tensor, ...]:
    return importance_weights(x["logprobs"].reshape(-1), x["ref"].reshape(-1), clip=1.0, differentiable=True)


Call = Callable[[Inputs], tuple[Tensor, ...]]
CALLS: dict[str, Call] = {
    "policy_terms": _policy,
    "policy_terms packed": _gspo,
    "gae": _gae,
    "sequence_logprobs": _sequences,
    "importance_weights": _weights,
}


def step(call: Call, inputs: Inputs) -> list[Tensor]:
    """Outputs, and the gradient of a function of those that have one."""
    logprobs = inputs["logprobs"].detach().requires_grad_()
    outputs = list(call(inputs | {"logprobs": logprobs}))
    differentiable = [x for x in outputs if x.requires_grad]
    if differentiable:
        outputs += torch.autograd.grad([x.square().sum() for x in differentiable], logprobs)
    return [x.detach() for x in outputs]


@pytest.mark.parametrize("name", CALLS)
def test_nobody_waits(name: str) -> None:
    inputs = make_inputs()
    want = step(CALLS[name], inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(CALLS[name], inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_replays_on_new_values(name: str) -> None:
    inputs = make_inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(CALLS[name], inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(CALLS[name], inputs)
    inputs["logprobs"].mul_(1.01)
    inputs["ref"].mul_(1.5)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step(CALLS[name], inputs)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_break(name: str) -> None:
    inputs = make_inputs()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for mine, plain in zip(step(compiled, inputs), step(CALLS[name], inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)


def _op_arguments(op: str) -> tuple[Any, ...]:
    x = make_inputs()
    logprobs = x["logprobs"].requires_grad_()
    if op == "sequence_logprobs":
        return logprobs, x["mask"], None, True
    if op == "importance_weights":
        return logprobs.detach().reshape(-1).requires_grad_(), x["ref"].reshape(-1), None, -1.0, 2.0, 0.5
    tensors = (logprobs, x["advantages"], x["mask"], None, x["old"], x["ref"], x["rollout"], x["entropy"], None, None)
    return *tensors, 0.0, True, 1, 0.2, 0.3, 0.0, 0.3, 2, 0.2, 1.3, 0.6, 1.8, False, 0, True


@pytest.mark.parametrize("op", ["policy_terms", "sequence_logprobs", "importance_weights"])
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.irlfast, op).default, _op_arguments(op))


def test_offsets_may_be_on_the_cpu() -> None:
    inputs = make_inputs()
    flat = inputs["logprobs"].reshape(-1)
    want = sequence_logprobs(flat, cu_seqlens=inputs["offsets"])
    assert torch.equal(sequence_logprobs(flat, cu_seqlens=inputs["offsets"].cpu()), want)
    with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 3"):
        sequence_logprobs(flat, cu_seqlens=torch.tensor([0, 3]))


def test_more_sequences_than_a_grid_has_rows() -> None:
    logprobs = torch.ones(70_000, 3, device="cuda", requires_grad=True)
    loss = policy_terms(logprobs, torch.ones(70_000, device="cuda"), aggregation="seq_mean_token_mean").loss
    assert float(loss.detach()) == -1.0
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -1 / 210_000))
    assert torch.equal(sequence_logprobs(logprobs), torch.full((70_000,), 3.0, device="cuda"))


def test_more_sequences_than_a_grid_s_second_dimension_holds() -> None:
    """65,535; groups of importance_weights too."""
    count, width = 70_001, 4
    torch.manual_seed(0)
    logprobs, old, rewards = torch.randn(3, count, width, device="cuda").unbind()
    advantages, mask = torch.randn(count, device="cuda"), torch.rand(count, width, device="cuda") > 0.2
    groups = torch.arange(count, device="cuda")[:, None].expand(count, width).reshape(-1)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaf = logprobs.detach().requires_grad_()
        terms = policy_terms(leaf, advantages, mask, term="ppo", old_logprobs=old, impl=impl)
        sums = sequence_logprobs(leaf, mask, impl=impl)
        (gradient,) = torch.autograd.grad(terms.loss * count + sums.sum(), leaf)
        estimates = gae(rewards, old, mask, impl=impl)
        weights = importance_weights(logprobs.reshape(-1), old.reshape(-1), groups=groups, impl=impl)
        return *terms, sums, gradient, *estimates, *weights

    for mine, right in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(mine, right.to(mine.dtype), rtol=1e-4, atol=1e-4)
