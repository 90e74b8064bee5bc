"""token_kl beside eager PyTorch and torch.compile: the exact divergence from a reference, and the policy's gradient."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
from bench.token_stats import print_report
from irlfast.ops import token_kl, token_kl_reference

Form = Callable[[Tensor, Tensor], Tensor]

OURS = "irlfast"
OURS_INPLACE = "irlfast, gradient in place"


def reverse_by_log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum exp(log p) (log p - log q)."""
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_by_lse(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum softmax(z) (z - z') - lse + lse'."""
    z, ref_z = logits.float(), ref_logits.float()
    return (z.softmax(-1) * (z - ref_z)).sum(-1) - z.logsumexp(-1) + ref_z.logsumexp(-1)


def forward_by_log_softmax(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return reverse_by_log_softmax(ref_logits, logits)


def forward_by_kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def js_by_logaddexp(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def js_by_probabilities(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.float().softmax(-1), ref_logits.float().softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


FORMS: dict[str, dict[str, Form]] = {
    "reverse": {"log-softmax form": reverse_by_log_softmax, "lse form": reverse_by_lse},
    "forward": {"log-softmax form": forward_by_log_softmax, "kl_div form": forward_by_kl_div},
    "js": {"logaddexp form": js_by_logaddexp, "probability form": js_by_probabilities},
}


def ours(kind: Any, inplace: bool = False) -> Form:
    return lambda logits, ref_logits: token_kl(logits, ref_logits, kind=kind, inplace_backward=inplace)


def gradient(form: Form, logits: Tensor, ref_logits: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(form(logits, ref_logits), logits, upstream)[0]


def assert_right(
    name: str, kind: str, value: Tensor, gradient_: Tensor, logits: Tensor, ref_logits: Tensor, upstream: Tensor
) -> None:
    """Against float64 on some rows; loose enough for every form, tight enough to know a wrong one."""
    rows = slice(0, 8)
    leaf = logits[rows].detach().double().requires_grad_()
    exact = token_kl_reference(leaf, ref_logits[rows].double(), kind=kind)
    (expected,) = torch.autograd.grad(exact, leaf, upstream[rows].double())
    torch.testing.assert_close(value[rows].double(), exact.detach(), rtol=1e-4, atol=1e-4, msg=f"{name} is wrong")
    half = 1e-2 if logits.dtype != torch.float32 else 1e-4
    torch.testing.assert_close(gradient_[rows].double(), expected, rtol=half, atol=1e-5, msg=f"{name}: wrong gradient")


def measure(rows: int, vocab: int, dtype: str, kind: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds, paired ratios, bandwidth and memory of every contender, forward and forward + backward."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    wide = torch.randn(rows, vocab) * 3
    logits = wide.to(getattr(torch, dtype))
    ref_logits = (wide + 0.3 * torch.randn(rows, vocab)).to(logits.dtype)
    del wide
    upstream = torch.randn(rows)
    leaf = logits.detach().requires_grad_()
    forms: dict[str, Form] = {OURS: ours(kind)}
    for name, form in FORMS[kind].items():
        forms[f"eager, {name}"] = form
        forms[f"torch.compile, {name}"] = torch.compile(form, fullgraph=True, dynamic=False)

    forward, both = [], []
    for name, form in forms.items():
        with torch.no_grad():
            value = form(logits, ref_logits)
        assert_right(name, kind, value, gradient(form, leaf, ref_logits, upstream), logits, ref_logits, upstream)
        forward.append(Contender(name=name, run=_forward(form, logits, ref_logits)))
        both.append(Contender(name=name, run=_both(form, leaf, ref_logits, upstream)))

    # A tensor that is no leaf, as logits out of a model are; refilled before each run, outside the timing.
    held: list[Tensor] = [logits.clone().requires_grad_() * 1]
    inplace = ours(kind, inplace=True)
    result = gradient(inplace, held[0], ref_logits, upstream)
    assert result.data_ptr() == held[0].data_ptr()
    assert_right(OURS_INPLACE, kind, ours(kind)(logits, ref_logits), result, logits, ref_logits, upstream)

    def refill() -> None:
        held[0] = held[0].detach().copy_(logits).requires_grad_().view_as(logits)

    both.append(
        Contender(name=OURS_INPLACE, run=lambda: gradient(inplace, held[0], ref_logits, upstream), prepare=refill)
    )

    nbytes = logits.numel() * logits.element_size()
    copy = copy_contender(max(logits.numel(), 1 << 24))
    copied = 8 * max(logits.numel(), 1 << 24)
    report = {}
    # Forward reads both rows, backward reads both and writes one.
    for name, contenders, passes in (("forward", forward, 2), ("forward + backward", both, 5)):
        with torch.set_grad_enabled(name != "forward"):
            memory = {c.name: peak_above_inputs(c) for c in contenders}
            times = time_in_turn([*contenders, copy], rounds)
        report[name] = {
            "copy_gb_per_s": copied / statistics.median(times["copy"]) / 1e9,
            "contenders": {
                c.name: {
                    "median_ms": statistics.median(times[c.name]) * 1e3,
                    "ratio_to_irlfast": paired_ratio(times, c.name, OURS),
                    "ratio_to_irlfast_inplace": paired_ratio(times, c.name, OURS_INPLACE) if passes == 5 else None,
                    "gb_per_s": passes * nbytes / statistics.median(times[c.name]) / 1e9,
                    "peak_mib_above_inputs": None if (m := memory[c.name]) is None else m / 2**20,
                }
                for c in contenders
            },
        }
    return report


def _forward(form: Form, logits: Tensor, ref_logits: Tensor) -> Callable[[], Any]:
    return lambda: form(logits, ref_logits)


def _both(form: Form, leaf: Tensor, ref_logits: Tensor, upstream: Tensor) -> Callable[[], Any]:
    return lambda: gradient(form, leaf, ref_logits, upstream)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench token_kl", description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--kind", choices=list(FORMS), default="reverse")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    arguments = parser.parse_args(argv)
    if not tests_pass("token_kl"):
        print("token_kl fails its tests: no figures", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "bench", "token_kl", *argv])
    config = {k: v for k, v in vars(arguments).items() if k != "json"}
    origin = provenance(command)
    results = measure_under_malloc_settings("bench.token_kl", config)
    print(f"{command}\n{origin['machine']}, {arguments.threads} threads, {origin['isa']}, torch {origin['torch']}")
    print("peak MiB: resident memory of one run above what was there before; ratios: medians of paired rounds")
    print_report(results)
    if arguments.json is not None:
        write_json(arguments.json, {**origin, "config": config, "malloc": results})
    return 0
