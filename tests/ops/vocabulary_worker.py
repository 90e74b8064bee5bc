"""One of several ranks: runs every case of `vocabulary_cases` on its slice, and writes what it got."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from vocabulary_cases import CASES, DEPTH, VOCAB, Case, batch

from irlfast.ops import gather_head, linear_policy_ref_stats, linear_token_loss, linear_token_stats, token_stats

TIMEOUT = datetime.timedelta(seconds=240)


def options_of(case: Case, given: Any) -> dict[str, Any]:
    options = {name: value for name, value in case.options.items() if name != "temperatures"}
    if case.options.get("temperatures"):
        options["temperature"] = given.temperature
    return options


def run(case: Case, rank: int, group: Any) -> dict[str, Any]:
    """Statistics and gradients of this rank."""
    given, part = batch(case), case.part(rank)
    hidden = given.hidden.clone().requires_grad_()
    weight = given.weight[part].clone().requires_grad_(case.trained)
    bias = given.bias[part].clone().requires_grad_(case.trained)
    options = options_of(case, given)
    if case.op == "logits":
        logits = (given.hidden @ given.weight.T + given.bias)[:, part].requires_grad_()
        stats: Any = token_stats(logits, given.labels, group=group, **options)
        upstream = [u.to(s.dtype) for u, s in zip(given.upstream, stats, strict=False)]
        return {"stats": [s.detach() for s in stats], "gradients": list(torch.autograd.grad(stats, logits, upstream))}
    if case.op == "pair":
        ref = given.ref_hidden, given.ref_weight[part]
        stats = linear_policy_ref_stats(
            hidden, weight, *ref, given.labels, bias=bias, group=group, impl=case.impl, **options
        )
        outputs = [stats.logprob, stats.entropy, stats.lse, stats.reverse_kl, stats.forward_kl]
    else:
        stats = linear_token_stats(
            hidden, weight, given.labels, bias=bias, group=group, mode=case.mode, impl=case.impl, **options
        )
        outputs = list(stats)
    leaves = [hidden, weight, bias] if case.trained else [hidden]
    upstream = [u.to(o.dtype) for u, o in zip(given.upstream, outputs, strict=False)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return {"stats": [s.detach() for s in stats], "gradients": list(gradients)}


def counted(function: Callable[[], Any]) -> dict[str, int]:
    """How often each collective was called."""
    counts: dict[str, int] = {}
    names = [n for n in ("all_gather_single", "all_gather_into_tensor", "all_reduce", "broadcast") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        function()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {"gathered": counts.get("all_gather_single", counts.get("all_gather_into_tensor", 0)),
            "reduced": counts.get("all_reduce", 0), "others": counts.get("broadcast", 0)}  # fmt: skip


def refusals(rank: int) -> dict[str, str]:
    """What each rank is told where one of them, the second, is given something else."""
    case = Case(4)
    given = batch(case)
    part = given.weight[case.part(rank)]
    second = rank == 1

    def call(
        hidden: Tensor = given.hidden, weight: Tensor = part, labels: Tensor = given.labels, **options: Any
    ) -> str:
        try:
            linear_token_stats(hidden, weight, labels, group=dist.group.WORLD, **options)
        except (IndexError, TypeError, ValueError, RuntimeError) as problem:
            return f"{type(problem).__name__}: {problem}"
        return "accepted"

    other_labels = given.labels.clone()
    other_labels[3] += 1
    outside = given.labels.clone()
    outside[4] = VOCAB
    results = {
        "width": call(weight=part[:, :-1] if second else part),
        "three dimensions": call(weight=part[None] if second else part),
        "no column": call(weight=part[:0] if second else part),
        "type": call(weight=part.double() if second else part),
        "rows": call(hidden=given.hidden[:-1], labels=given.labels[:-1]) if second else call(),
        "labels": call(labels=other_labels if second else given.labels),
        "softcap": call(softcap=5.0 if second else None),
        "temperature": call(temperature=2.0 if second else 1.0),
        "mode": call(mode="fast" if second else "keep"),
        "fused": call(mode="fused"),
        "impl": call(impl="cuda" if second else "cpu"),
        "gradient": call(hidden=given.hidden.clone().requires_grad_(second)),
        "label": call(labels=outside),
    }
    results["afterwards"] = call()
    return results


def dtensors(rank: int, world: int) -> dict[str, Any]:
    """A head as DTensor: a slice with the group or with replicated hidden states, gathered without either."""
    mesh = init_device_mesh("cpu", (world,))
    given = batch(Case(4, "float64"))
    results: dict[str, Any] = {}
    for name in ("group", "replicated"):
        weight = distribute_tensor(given.weight, mesh, [Shard(0)]).requires_grad_()
        bias = distribute_tensor(given.bias, mesh, [Shard(0)]).requires_grad_()
        hidden: Tensor = given.hidden.clone()
        labels: Tensor = given.labels
        if name == "replicated":
            hidden = DTensor.from_local(hidden, mesh, [Replicate()])
            labels = DTensor.from_local(labels, mesh, [Replicate()])
        hidden.requires_grad_()
        group = mesh.get_group() if name == "group" else None
        stats = linear_token_stats(hidden, weight, labels, bias=bias, group=group)
        (stats.logprob * given.upstream[0]).sum().backward()
        whole = hidden.grad.full_tensor() if isinstance(hidden.grad, DTensor) else hidden.grad
        results[name] = [stats.logprob.detach(), whole, weight.grad.full_tensor(), bias.grad.full_tensor()]
    # Rows of its own on each rank.
    weight = distribute_tensor(given.weight, mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(given.bias, mesh, [Shard(0)]).requires_grad_()
    mine = slice(2 * rank, 2 * rank + 2)
    hidden = given.hidden[mine].clone().requires_grad_()
    stats = linear_token_stats(hidden, weight, given.labels[mine], bias=bias)
    (stats.logprob * given.upstream[0, mine]).sum().backward()
    results["gathered"] = [
        stats.logprob.detach(),
        hidden.grad.clone(),
        weight.grad.full_tensor(),
        bias.grad.full_tensor(),
    ]
    results["placement"] = str(weight.grad.placements)
    weight = distribute_tensor(given.weight, mesh, [Shard(0)]).requires_grad_()
    linear_token_loss(hidden, weight, given.labels[mine], lambda stats, rows: stats.logprob.sum()).backward()
    results["loss gradient"] = weight.grad.full_tensor()
    # Once for two calls, in several steps.
    module = sys.modules["irlfast.ops.gather_head"]
    module.BUFFER_BYTES = 1000 * DEPTH * 8 * world
    weight = distribute_tensor(given.weight, mesh, [Shard(0)]).requires_grad_()

    def twice() -> None:
        head = gather_head(weight)
        first = linear_token_stats(hidden, head, given.labels[mine]).logprob.sum()
        second = linear_token_stats(hidden, head, given.labels[mine]).logprob.sum()
        (first + second).backward()

    results["twice"] = counted(twice)
    results["twice gradient"] = weight.grad.full_tensor()
    half = gather_head(distribute_tensor(given.weight[:5], mesh, [Shard(0)]), dtype=torch.bfloat16)
    results["half"] = half
    return results


class Model(torch.nn.Module):
    """Token embeddings, a layer, a head that forward leaves to the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, DEPTH)
        self.layer = torch.nn.Linear(DEPTH, DEPTH)
        self.head = torch.nn.Linear(DEPTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(tokens)))


def fsdp(rank: int, apart: bool) -> dict[str, Any]:
    """Two steps on this rank's rows; the head a module of its own, sharded when the loss takes it, or the root's."""
    model = Model()
    if apart:
        fully_shard(model.head)
    fully_shard(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    kinds, losses = [], []
    for step in range(2):
        tokens = torch.arange(6).view(2, 3) * 37 + 11 * rank + step
        hidden = model(tokens)
        kinds.append(type(model.head.weight).__name__)
        loss = -linear_token_stats(hidden, model.head.weight, tokens + 1).logprob.mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    parameters = {name: value.full_tensor() for name, value in model.state_dict().items()}
    return {"kinds": kinds, "losses": torch.stack(losses), "parameters": parameters}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    # Of two ranks whose numbers in the group are others than in the world.
    pairs = [dist.new_group([0, 1], timeout=TIMEOUT), dist.new_group([2, 3], timeout=TIMEOUT)]
    groups = {2: (pairs[rank // 2], rank % 2), 4: (dist.group.WORLD, rank)}
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        group, place = groups[case.ranks]
        results[name] = run(case, place, group)
        results[f"{name} again"] = run(case, place, group)
    results["collectives"] = counted(lambda: run(CASES["recompute float32 4"], rank, dist.group.WORLD))
    results["refusals"] = refusals(rank)
    results["dtensors"] = dtensors(rank, world)
    for apart in (False, True):
        results[f"fsdp {apart}"] = fsdp(rank, apart)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
