"""What nvcc makes of the kernels, without a GPU. All architectures: `python -m bench.cuda_resources`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cuda_resources

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "cuda_resources.json"

# Of 16 bytes: forward two packs of each row in flight, which Jensen-Shannon reads twice; backward as many, and as many
# stores a gradient, and one or more for rows of zeros.
LOADS = {"token_stats_forward": 2, "token_stats_backward": 2, "token_kl_forward": 4, "token_kl_backward": 4}
STORES = {"token_stats_forward": 0, "token_stats_backward": 3, "token_kl_forward": 0, "token_kl_backward": 6}


def check(row: dict[str, Any]) -> None:
    kernel = row["kernel"].partition("<")[0]
    assert (row["spills"], row["stack"], row["local"]) == (0, 0, 0), row
    if kernel in LOADS:
        twice = 2 if kernel == "token_kl_forward" and "true" in row["kernel"] else 1
        assert row["loads_128"] == twice * LOADS[kernel], row
        assert row["stores_128"] >= STORES[kernel], row


def test_compiles_without_a_warning_and_no_kernel_spills() -> None:
    for tool, found in (("nvcc", cuda_resources.find_nvcc()), ("cuobjdump", cuda_resources.find_cuobjdump())):
        if found is None:
            pytest.skip(f"{tool} is not on PATH")
    rows = cuda_resources.report(["90"])
    assert {row["source"] for row in rows} == {path.name for path in cuda_resources.sources()}
    for row in rows:
        check(row)


def test_the_committed_report_is_of_every_architecture() -> None:
    report = json.loads(COMMITTED.read_text())
    assert report["architectures"] == [*cuda_resources.ARCHITECTURES, "120-virtual"]
    of_each = {
        a: {r["kernel"] for r in report["kernels"] if r["architecture"] == f"sm_{a}"}
        for a in cuda_resources.ARCHITECTURES
    }
    assert len({frozenset(kernels) for kernels in of_each.values()}) == 1
    for row in report["kernels"]:
        check(row)


def test_flags_and_architectures_are_those_of_the_build() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for flag in cuda_resources.FLAGS[2:]:
        assert flag in cmake
    listed = [f"{a}-real" for a in cuda_resources.ARCHITECTURES] + ["120-virtual"]
    assert f"set(CMAKE_CUDA_ARCHITECTURES {' '.join(listed)})" in cmake
    for path in cuda_resources.sources():
        assert str(path.relative_to(ROOT)) in cmake
