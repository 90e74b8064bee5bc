"""token_stats beside eager PyTorch and torch.compile: the same outputs and upstream gradients asked of all."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._harness import (
    Contender,
    copy_contender,
    measure_under_malloc_settings,
    paired_ratio,
    peak_above_inputs,
    provenance,
    tests_pass,
    time_in_turn,
    write_json,
)
from irlfast.ops import token_logprobs, token_stats, token_stats_reference

Outputs = tuple[Tensor, ...]
Form = Callable[[Tensor, Tensor], Outputs]

OURS = "irlfast"
OURS_INPLACE = "irlfast, gradient in place"


def logprob_gathered(logits: Tensor, labels: Tensor) -> Outputs:
    return (logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1),)


def logprob_less_lse(logits: Tensor, labels: Tensor) -> Outputs:
    wide = logits.float()
    return (wide.gather(-1, labels[:, None]).squeeze(-1) - wide.logsumexp(-1),)


def entropy_by_softmax(logits: Tensor, labels: Tensor) -> Outputs:
    """lse - sum softmax(z) z."""
    wide = logits.float()
    lse = wide.logsumexp(-1)
    logprob = wide.gather(-1, labels[:, None]).squeeze(-1) - lse
    return logprob, lse - (wide.softmax(-1) * wide).sum(-1)


def entropy_by_p_log_p(logits: Tensor, labels: Tensor) -> Outputs:
    """- sum p log p."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


FORMS: dict[str, dict[str, Form]] = {
    "logprob": {"log-softmax form": logprob_gathered, "lse form": logprob_less_lse},
    "logprob_entropy": {"softmax form": entropy_by_softmax, "p log p form": entropy_by_p_log_p},
}


def ours(outputs: str, inplace: bool = False) -> Form:
    def form(logits: Tensor, labels: Tensor) -> Outputs:
        if outputs == "logprob":
            return (token_logprobs(logits, labels, inplace_backward=inplace),)
        return tuple(token_stats(logits, labels, inplace_backward=inplace)[:2])

    return form


def gradient(form: Form, logits: Tensor, labels: Tensor, upstream: Outputs) -> Tensor:
    return torch.autograd.grad(form(logits, labels), logits, upstream)[0]


def assert_right(name: str, values: Outputs, gradient_: Tensor, logits: Tensor, labels: Tensor, g: Outputs) -> None:
    """Against float64 on some rows; loose enough for every form, tight enough to know a wrong one."""
    rows = slice(0, 8)
    leaf = logits[rows].double().requires_grad_()
    exact = token_stats_reference(leaf, labels[rows])[: len(values)]
    (expected,) = torch.autograd.grad(exact, leaf, [x[rows].double() for x in g])
    for value, truth in zip(values, exact, strict=True):
        torch.testing.assert_close(value[rows].double(), truth.detach(), rtol=1e-4, atol=1e-4, msg=f"{name} is wrong")
    half = 1e-2 if logits.dtype != torch.float32 else 1e-4
    torch.testing.assert_close(gradient_[rows].double(), expected, rtol=half, atol=1e-5, msg=f"{name}: wrong gradient")


def measure(rows: int, vocab: int, dtype: str, outputs: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds, paired ratios, bandwidth and memory of every contender, forward and forward + backward."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    logits = (torch.randn(rows, vocab) * 3).to(getattr(torch, dtype))
    labels = torch.randint(vocab, (rows,))
    count = len(outputs.split("_"))
    upstream = tuple(torch.randn(rows) for _ in range(count))
    leaf = logits.detach().requires_grad_()
    forms: dict[str, Form] = {OURS: ours(outputs)}
    for name, form in FORMS[outputs].items():
        forms[f"eager, {name}"] = form
        forms[f"torch.compile, {name}"] = torch.compile(form, fullgraph=True, dynamic=False)

    forward, both = [], []
    for name, form in forms.items():
        with torch.no_grad():
            values = form(logits, labels)
        assert_right(name, values, gradient(form, leaf, labels, upstream), logits, labels, upstream)
        forward.append(Contender(name=name, run=_forward(form, logits, labels)))
        both.append(Contender(name=name, run=_both(form, leaf, labels, upstream)))
    owned = logits.clone().requires_grad_() * 1
    inplace = ours(outputs, inplace=True)
    result = gradient(inplace, owned, labels, upstream)
    assert result.data_ptr() == owned.data_ptr()
    assert_right(OURS_INPLACE, forms[OURS](logits, labels), result, logits, labels, upstream)

    # A tensor that is no leaf, as logits out of a model are; refilled before each run, outside the timing.
    held: list[Tensor] = [owned]

    def refill() -> None:
        held[0] = held[0].detach().copy_(logits).requires_grad_().view_as(logits)

    both.append(Contender(name=OURS_INPLACE, run=lambda: gradient(inplace, held[0], labels, upstream), prepare=refill))

    nbytes = logits.numel() * logits.element_size()
    copy = copy_contender(max(logits.numel(), 1 << 24))
    copied = 8 * max(logits.numel(), 1 << 24)
    report = {}
    for kind, contenders, passes in (("forward", forward, 1), ("forward + backward", both, 3)):
        with torch.set_grad_enabled(kind != "forward"):
            memory = {c.name: peak_above_inputs(c) for c in contenders}
            times = time_in_turn([*contenders, copy], rounds)
        report[kind] = {
            "copy_gb_per_s": copied / statistics.median(times["copy"]) / 1e9,
            "contenders": {
                c.name: {
                    "median_ms": statistics.median(times[c.name]) * 1e3,
                    "ratio_to_irlfast": paired_ratio(times, c.name, OURS),
                    "ratio_to_irlfast_inplace": paired_ratio(times, c.name, OURS_INPLACE) if passes == 3 else None,
                    "gb_per_s": passes * nbytes / statistics.median(times[c.name]) / 1e9,
                    "peak_mib_above_inputs": None if (m := memory[c.name]) is None else m / 2**20,
                }
                for c in contenders
            },
        }
    return report


def _forward(form: Form, logits: Tensor, labels: Tensor) -> Callable[[], Any]:
    return lambda: form(logits, labels)


def _both(form: Form, leaf: Tensor, labels: Tensor, upstream: Outputs) -> Callable[[], Any]:
    return lambda: gradient(form, leaf, labels, upstream)


def print_report(results: dict[str, dict[str, Any]]) -> None:
    for setting, report in results.items():
        for kind, block in report.items():
            print(f"\n{kind}, malloc {setting}; copy bandwidth in this run {block['copy_gb_per_s']:.1f} GB/s")
            print(f"{'':32}{'ms':>9}{'x irlfast':>11}{'x in place':>12}{'GB/s':>8}{'peak MiB':>10}")
            for name, row in block["contenders"].items():
                inplace, peak = row["ratio_to_irlfast_inplace"], row["peak_mib_above_inputs"]
                print(
                    f"{name:32}{row['median_ms']:9.2f}{row['ratio_to_irlfast']:11.2f}"
                    f"{'' if inplace is None else f'{inplace:.2f}':>12}{row['gb_per_s']:8.1f}"
                    f"{'' if peak is None else f'{peak:.0f}':>10}"
                )
            for family in ("eager", "torch.compile"):
                better = min(
                    (n for n in block["contenders"] if n.startswith(family)),
                    key=lambda n: block["contenders"][n]["median_ms"],
                )
                print(
                    f"the better {family} takes {block['contenders'][better]['ratio_to_irlfast']:.2f} x irlfast's time"
                )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench token_stats", description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--outputs", choices=list(FORMS), default="logprob_entropy")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    arguments = parser.parse_args(argv)
    if not tests_pass("token_stats"):
        print("token_stats fails its tests: no figures", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "bench", "token_stats", *argv])
    config = {k: v for k, v in vars(arguments).items() if k != "json"}
    origin = provenance(command)
    results = measure_under_malloc_settings("bench.token_stats", config)
    print(f"{command}\n{origin['machine']}, {arguments.threads} threads, {origin['isa']}, torch {origin['torch']}")
    print("peak MiB: resident memory of one run above what was there before; ratios: medians of paired rounds")
    print_report(results)
    if arguments.json is not None:
        write_json(arguments.json, {**origin, "config": config, "malloc": results})
    return 0
