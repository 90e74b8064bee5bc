"""The cost model's table: bytes, products and predicted times, and beside each what was measured, if it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench._report import milliseconds, table
from bench.gpu._cases import CASES, GpuCase, in_the_model
from bench.gpu._cost import CHIPS, Chip, Cost, costs

UNMEASURED = "unmeasured"
# As torch names the GPUs of CHIPS.
DEVICE_NAMES = {"H100 SXM": ("NVIDIA H100 80GB HBM3",), "H200": ("NVIDIA H200",), "MI300X": ("MI300X",)}


def model_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Of every case of the model; `results` are files of `python -m bench gpu`."""
    header = ["work", "shape", "pass", "mode", "GB", "products", "TFLOP"]
    for chip in CHIPS:
        header += [f"{chip.name}: predicted ms", "measured ms"]
    body = []
    outputs = list(dict.fromkeys(case.outputs for case in CASES))
    cases = filter(in_the_model, CASES)
    for case in sorted(cases, key=lambda case: (case.line, outputs.index(case.outputs), case.shape)):
        for (pass_name, mode), cost in costs(case).items():
            cells = [case.work, "x".join(map(str, case.shape)), pass_name, mode, *_amounts(cost)]
            for chip in CHIPS:
                cells += [f"{cost.seconds(chip) * 1e3:.3g}", _measured(results, chip, case, pass_name, mode)]
            body.append(cells)
    sources = "; ".join(
        f"{chip.name} {chip.bandwidth / 1e12:g} TB/s and {chip.rate / 1e12:g} TF/s ({chip.source})" for chip in CHIPS
    )
    return f"Published figures: {sources}.\n\n{table(header, body)}"


def _amounts(cost: Cost) -> list[str]:
    nbytes = f"{cost.nbytes / 1e9:.2f}" if cost.nbytes >= 1e7 else f"{cost.nbytes / 1e9:.2g}"
    return [nbytes, str(cost.products or ""), f"{cost.flop / 1e12:.1f}" if cost.flop else ""]


def _measured(results: Sequence[Mapping[str, Any]], chip: Chip, case: GpuCase, pass_name: str, mode: str) -> str:
    """The latest on that chip."""
    subject = f"irlfast, {mode}" if mode else "irlfast"
    found = [
        row
        for part in results
        for row in part["rows"]
        if row["impl"] != "reference"
        and any(name in part["runs"][row["run"]].get("gpu", "") for name in DEVICE_NAMES[chip.name])
        and (row["op"], row["work"], row["shape"]) == (case.op, case.work, list(case.shape))
        and (row["dtype"], row["pass"], row["subject"]) == (case.dtype, pass_name, subject)
    ]
    if not found:
        return UNMEASURED
    row = max(found, key=lambda row: row["date"])
    return milliseconds(row["contenders"][subject]["median_ms"])
