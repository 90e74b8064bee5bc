"""irlfast's loss for slime beside slime's own policy_loss: that both agree, and what each costs.

    python -m bench.slime --checkout CHECKOUT

CHECKOUT is slime's source. Its loss runs over a Megatron of one rank that is made up for it, eagerly: it is compiled by
slime in three small places, after the pass over the logits. The two take turns, each with one run before the timed one,
for the allocator to keep the memory that it needs, as that of a GPU does; the ratio is the median over the rounds.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from bench import _results
from bench._harness import paired_ratio
from bench._report import table
from bench._run import MALLOC_ENVIRONMENT
from irlfast.integrations.slime import loss

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, dict[str, Any]] = {
    "slime's defaults": {},
    "entropy bonus, temperature 0.8": {"entropy_coef": 0.01, "rollout_temperature": 0.8},
    "GSPO, KL k2, TIS": {
        "advantage_estimator": "gspo",
        "use_kl_loss": True,
        "kl_loss_coef": 0.01,
        "kl_loss_type": "k2",
        "use_tis": True,
    },
}
_BLOCK = re.compile(r"(?<=<!-- figures of slime.json -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Slime:
    """Compare irlfast's loss for slime with slime's own."""

    checkout: Path
    """slime's source, as git has it."""
    json: Path = ROOT / "docs" / "results" / "slime.json"
    """Where the figures go."""
    page: Path = ROOT / "docs" / "slime.md"
    """The page whose figures are renewed."""
    vocab: tuple[int, ...] = (32000, 151936)
    """Sizes of the vocabulary."""
    samples: int = 4
    """Samples of a micro-batch."""
    prompt: int = 64
    """Tokens of a prompt."""
    response: int = 192
    """Tokens of a response."""
    rounds: int = 5
    """Timed rounds."""
    threads: int = 1
    """torch's threads."""


def renew(page: str, figures: Mapping[str, Any]) -> str:
    """The page with these figures. ValueError: it has no place for them."""
    if not _BLOCK.search(page):
        raise ValueError("the page has no <!-- figures of slime.json --> with <!-- end of figures --> after it")
    return _BLOCK.sub(lambda _: f"\n{text(figures)}\n\n", page)


def text(figures: Mapping[str, Any]) -> str:
    """A sentence and a table."""
    worst, machine = figures["largest_difference"], figures["provenance"]
    rows = [
        (
            row["settings"],
            str(row["vocab"]),
            f"{row['slime_ms']:.0f}",
            f"{row['irlfast_ms']:.0f}",
            f"{row['ratio']:.1f}",
        )
        for row in figures["timings"]
    ]
    return f"""\
Over {figures["cases"]} settings in float32 the largest difference to slime's policy_loss
(commit {figures["commit"][:8]}) is {worst["loss"]:.1e} of the loss, {worst["gradient"]:.1e} of a logit's gradient and
{worst["metrics"]:.1e} of a metric.

{table(("settings", "V", "slime, ms", "irlfast, ms", "times as long"), rows)}

Forward and backward of {figures["samples"]} samples of {figures["prompt"]} + {figures["response"]} tokens, float32,
on a CPU ({machine["machine"]}, threads: {figures["threads"]}); medians of {figures["rounds"]} rounds; load average
{machine["load_average"][0]:.1f}. slime's own is written for GPUs, where neither has been timed."""


def measure(options: Slime, theirs: Any, vocab: int, name: str) -> dict[str, Any]:
    """Milliseconds of both, forward and backward."""
    args = importlib.import_module("slime_cases").arguments(**SETTINGS[name])
    batch, logits = micro_batch(options, vocab)
    masks = (batch["loss_masks"], batch["rollout_mask_sums"])
    reduce = theirs.get_sum_of_sample_mean(batch["total_lengths"], batch["response_lengths"], *masks, False)

    def seconds(function: Callable[..., tuple[Tensor, Any]]) -> float:
        for _ in range(2):
            given = logits.detach().requires_grad_()
            start = time.perf_counter()
            function(args, batch, given, reduce)[0].backward()
            taken = time.perf_counter() - start
            del given
        return taken

    rounds = [(seconds(theirs.policy_loss_function), seconds(loss)) for _ in range(options.rounds)]
    slime, ours = ([row[i] for row in rounds] for i in (0, 1))
    return {
        "settings": name,
        "vocab": vocab,
        "slime_ms": statistics.median(slime) * 1e3,
        "irlfast_ms": statistics.median(ours) * 1e3,
        "ratio": paired_ratio(slime, ours),
    }


def micro_batch(options: Slime, vocab: int) -> tuple[dict[str, Any], Tensor]:
    """A packed micro-batch and its logits."""
    torch.manual_seed(0)
    total, count = options.prompt + options.response, options.samples

    def around(center: float) -> list[Tensor]:
        return [center + torch.randn(options.response) / 10 for _ in range(count)]

    batch: dict[str, Any] = {
        "unconcat_tokens": [torch.randint(vocab, (total,)) for _ in range(count)],
        "total_lengths": [total] * count,
        "response_lengths": [options.response] * count,
        "loss_masks": [torch.ones(options.response, dtype=torch.int) for _ in range(count)],
        "rollout_mask_sums": [torch.tensor(options.response)] * count,
        "advantages": [torch.randn(()).expand(options.response).clone() for _ in range(count)],
    }
    batch |= {name: around(-10.0) for name in ("log_probs", "rollout_log_probs", "ref_log_probs")}
    return batch, torch.randn(1, total * count, vocab)


def main(options: Slime) -> None:
    sys.path.append(str(ROOT / "tests" / "integrations"))
    cases = importlib.import_module("slime_cases")
    torch.set_num_threads(options.threads)
    theirs = cases.slimes_loss(options.checkout)
    differences = [cases.compare(theirs, name) for name in cases.CASES]
    revision = ["git", "-C", str(options.checkout), "rev-parse", "HEAD"]
    found: dict[str, Any] = {
        "commit": subprocess.run(revision, check=True, capture_output=True, text=True).stdout.strip(),
        "cases": len(cases.CASES),
        "largest_difference": {key: max(row[key] for row in differences) for key in differences[0]},
        **{key: getattr(options, key) for key in ("samples", "prompt", "response", "rounds", "threads")},
        "timings": [measure(options, theirs, vocab, name) for vocab in options.vocab for name in SETTINGS],
    }
    command = shlex.join(["python", "-m", "bench.slime", "--checkout", "CHECKOUT"])
    found = {"provenance": _results.provenance(command), **found}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(renew(options.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(text(found))


if __name__ == "__main__":
    options = tyro.cli(Slime)
    tuned = MALLOC_ENVIRONMENT["tuned"]
    if any(os.environ.get(name) != value for name, value in tuned.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "bench.slime", *sys.argv[1:]], {**os.environ, **tuned})
    main(options)
