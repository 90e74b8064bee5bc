"""The float32 product of bfloat16 matrices beside torch.mm, which rounds to bfloat16, and beside float32 copies.

`python -m bench._product` times the three products of the linear ops in paired rounds: logits Z = X W^T, hidden
gradients dX += dZ W, weight gradients dW = dZ^T X, for X [N, D], W [C, D] and dZ [N, C].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlfast import _native
from irlfast.ops._product import product

SHAPES = [(1024, 768, 2048), (1024, 768, 4096), (512, 1024, 4096), (1024, 4096, 2048)]
OURS, ROUNDED, WIDENED = "irlfast", "torch.mm, rounded to bfloat16", "torch.mm of float32 copies"


def products(n: int, d: int, c: int) -> dict[str, tuple[Tensor, Tensor, torch.dtype, bool]]:
    """Operands, type of the result, and whether it is added to what is there."""
    torch.manual_seed(0)
    x, w, dz = (torch.randn(shape).bfloat16() for shape in ((n, d), (c, d), (n, c)))
    return {
        "Z = X W^T, float32": (x, w.t(), torch.float32, False),
        "dX += dZ W, float32": (dz, w, torch.float32, True),
        "dW = dZ^T X, bfloat16": (dz.t(), x, torch.bfloat16, False),
        "dW += dZ^T X, float32": (dz.t(), x, torch.float32, True),
    }


def contenders(a: Tensor, b: Tensor, dtype: torch.dtype, accumulate: bool) -> dict[str, Callable[[], object]]:
    shape = a.shape[0], b.shape[1]
    out, rounded, wide = torch.zeros(shape, dtype=dtype), torch.zeros(shape).bfloat16(), torch.zeros(shape)
    return {
        OURS: lambda: product(a, b, out, accumulate=accumulate),
        ROUNDED: lambda: torch.mm(a, b, out=rounded),  # alone: what adding costs is not in it
        WIDENED: lambda: torch.mm(a.float(), b.float(), out=wide),
    }


def time_in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            begin = time.perf_counter()
            runs[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    n, d, c = shape
    for name, (a, b, dtype, accumulate) in products(n, d, c).items():
        times = time_in_turn(contenders(a, b, dtype, accumulate), rounds)
        gflop = 2e-9 * n * d * c
        rows.append(
            {
                "shape": shape,
                "product": name,
                "gflop_per_s": {who: gflop / statistics.median(t) for who, t in times.items()},
                "best_gflop_per_s": {who: gflop / min(t) for who, t in times.items()},
                # Time of the other over ours in the same round: above 1 where ours is faster.
                "ratio": {
                    who: statistics.median(x / y for x, y in zip(t, times[OURS], strict=True))
                    for who, t in times.items()
                },
            }
        )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench._product", description=__doc__)
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("N", "D", "C"), help="one shape instead of the usual four"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    native = _native.bf16_product_available()
    print(f"{arguments.threads} threads, torch {torch.__version__}, {'native' if native else 'float32 copies'}")
    print(f"{'N x D x C':16}{'product':24}{'GF/s: ours':>12}{'torch.mm':>10}{'float32':>9}{'x mm':>8}{'x float32':>11}")
    rows: list[dict[str, Any]] = []
    for shape in [tuple(arguments.shape)] if arguments.shape else SHAPES:
        for row in measure(shape, arguments.rounds):
            speed, ratio = row["gflop_per_s"], row["ratio"]
            print(
                f"{'x'.join(map(str, shape)):16}{row['product']:24}{speed[OURS]:12.0f}{speed[ROUNDED]:10.0f}"
                f"{speed[WIDENED]:9.0f}{ratio[ROUNDED]:8.2f}{ratio[WIDENED]:11.2f}"
            )
            rows.append(row)
    if arguments.json:
        origin = {"threads": arguments.threads, "torch": torch.__version__, "load_average": os.getloadavg()}
        Path(arguments.json).write_text(json.dumps({**origin, **_native.build_info(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
