"""`python -m bench launch`: the time that Python takes to get a GPU's kernels launched; takes no GPU.

A call of each op with impl="triton" is timed with Triton's launcher replaced by a function that returns at once, on
small tensors of the CPU; and so are, by themselves, the launches that the call consists of, with the arguments it gave
them. The difference is what a call costs over its launches: checks, allocations, autograd, torch's own operators. What
is missing is what only a GPU's allocator and queue add to those.

Time is the processor's, of the one thread, so that whoever else is running shows in it through the caches alone.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import _results
from bench._report import table
from irlfast import ops

FORWARD, RECORDED, BOTH = "forward", "forward, recorded for backward", "forward + backward"
LIMIT_US = 25.0
ROWS, DEPTH, VOCAB = 4, 8, 64
BATCH, LENGTH = 8, 64

Launch = tuple[Any, Any, tuple[Any, ...], dict[str, Any]]  # kernel, grid and arguments


class Call(NamedTuple):
    """One call of an op: its differentiable outputs, and what they are differentiated by."""

    run: Callable[[], Sequence[Tensor]]
    leaves: tuple[Tensor, ...] = ()


def calls() -> dict[str, Call]:
    """A usual call of each op that has Triton kernels."""
    logits = torch.randn(ROWS, VOCAB, requires_grad=True)
    ref_logits = torch.randn(ROWS, VOCAB)
    hidden, weight = torch.randn(ROWS, DEPTH, requires_grad=True), torch.randn(VOCAB, DEPTH, requires_grad=True)
    labels = torch.arange(ROWS)
    logprobs = torch.randn(BATCH, LENGTH, requires_grad=True)
    old, ref, values = torch.randn(3, BATCH, LENGTH).unbind()
    mask, advantages = torch.ones(BATCH, LENGTH, dtype=torch.bool), torch.randn(BATCH)
    target, proposal = torch.randn(2, BATCH).unbind()
    target.requires_grad_()
    ppo: dict[str, Any] = {"term": "ppo", "old_logprobs": old, "ref_logprobs": ref, "kl_coef": 0.1}
    triton: dict[str, Any] = {"impl": "triton"}

    def linear(mode: Any) -> Call:
        return Call(
            lambda: ops.linear_token_stats(hidden, weight, labels, mode=mode, impl="triton")[:1], (hidden, weight)
        )

    return {
        "policy_terms": Call(lambda: ops.policy_terms(logprobs, advantages, mask, **ppo, **triton)[:1], (logprobs,)),
        "token_logprobs": Call(lambda: (ops.token_logprobs(logits, labels, **triton),), (logits,)),
        "token_stats": Call(lambda: ops.token_stats(logits, labels, **triton), (logits,)),
        "token_kl": Call(lambda: (ops.token_kl(logits, ref_logits, **triton),), (logits,)),
        "linear_token_stats, recompute": linear("recompute"),
        "linear_token_stats, fused": linear("fused"),
        "linear_policy_ref_stats": Call(
            lambda: ops.linear_policy_ref_stats(hidden, weight, hidden.detach(), weight.detach(), labels, **triton)[:1],
            (hidden, weight),
        ),
        "sequence_logprobs": Call(lambda: (ops.sequence_logprobs(logprobs, mask, **triton),), (logprobs,)),
        "importance_weights": Call(
            lambda: ops.importance_weights(target, proposal, differentiable=True, **triton)[:1], (target,)
        ),
        "gae": Call(lambda: ops.gae(old, values, mask, gamma=0.99, lam=0.95, **triton)),
    }


def passes(call: Call) -> Iterator[tuple[str, Callable[[], object]]]:
    def forward() -> None:
        with torch.no_grad():
            call.run()

    yield FORWARD, forward
    if call.leaves:
        outputs = call.run()
        upstream = [torch.ones_like(output) for output in outputs]
        yield RECORDED, call.run
        yield BOTH, lambda: torch.autograd.grad(list(call.run()), call.leaves, upstream)


def _yes() -> bool:
    return True


@contextmanager
def launcher(run: Callable[..., None]) -> Iterator[None]:
    """Within it, kernels take tensors of the CPU, and launching one is `run`."""
    from triton.runtime.jit import JITFunction

    from irlfast.ops import _triton

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(_triton, "interpreted", _yes):
        yield


def launches_of(function: Callable[[], object]) -> list[Launch]:
    launches: list[Launch] = []

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, grid, args, kwargs))

    with launcher(keep):
        function()
    return launches


def returns_at_once(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    pass


def measure(name: str, call: Call, rounds: int, repeat: int) -> list[dict[str, Any]]:
    rows = []
    for pass_name, function in _launched(passes(call)):
        launches = launches_of(function)

        def bare(launches: list[Launch] = launches) -> None:
            for kernel, grid, args, kwargs in launches:
                kernel[grid](*args, **kwargs)

        with launcher(returns_at_once):
            _microseconds(function, repeat)  # warms up
            pairs = [(_microseconds(function, repeat), _microseconds(bare, repeat)) for _ in range(rounds)]
        whole, alone = zip(*pairs, strict=True)
        over = [a - b for a, b in pairs]
        rows.append(
            {
                "op": name,
                "pass": pass_name,
                "launches": len(launches),
                "call_us": statistics.median(whole),
                "launches_us": statistics.median(alone),
                "over_us": statistics.median(over),
                "over_p5_us": statistics.quantiles(over, n=20)[0],
            }
        )
    return rows


def _launched(works: Iterator[tuple[str, Callable[[], object]]]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same, each asked for while nothing is launched."""
    while True:
        with launcher(returns_at_once):
            work = next(works, None)
        if work is None:
            return
        yield work


def _microseconds(function: Callable[[], object], repeat: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(repeat):
        function()
    return (time.thread_time_ns() - begin) / repeat / 1e3


def launch_table(results: Mapping[str, Any]) -> str:
    (run,) = results["runs"].values()
    header = ["op", "pass", "launches", "call: us", "its launches: us", "over them: us", "5th percentile: us"]
    body = [
        [
            row["op"],
            row["pass"],
            str(row["launches"]),
            *(f"{row[key]:.1f}" for key in ("call_us", "launches_us", "over_us", "over_p5_us")),
        ]
        for row in results["rows"]
    ]
    load = run["load_average"][0] if run["load_average"] else None
    origin = (
        f"{run['date'][:10]}, `{run['command']}`: {run['machine']}, {run['cores']} cores, load average {load:.1f}; "
        f"Python {run['python']}, torch {run['torch']}, Triton {run['peers'].get('triton')}."
    )
    return f"{origin}\n\n{table(header, body)}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench launch", description="What a call of each op costs over the launch of its kernels."
    )
    parser.add_argument("--json", metavar="FILE", help="keep the results there")
    parser.add_argument("--rounds", type=int, default=501, help="pairs whose median is taken; default 501")
    parser.add_argument("--repeat", type=int, default=10, help="calls timed at once; default 10")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    run = _results.provenance(shlex.join(["python", "-m", "bench", "launch", *argv]))
    rows = [
        {**row, "run": run["date"]}
        for name, call in calls().items()
        for row in measure(name, call, arguments.rounds, arguments.repeat)
    ]
    results = {"format": 1, "runs": {run["date"]: run}, "rows": rows}
    if arguments.json is not None:
        _results.write(arguments.json, results)
    print(launch_table(results))
    slow = [row for row in rows if row["pass"] == FORWARD and row["over_us"] > LIMIT_US]
    for row in slow:
        print(f"{row['op']}: {row['over_us']:.1f} us over its launches, the bar is {LIMIT_US:g}", file=sys.stderr)
    return 0
