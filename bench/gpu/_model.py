"""The cost model's table: bytes, products and predicted times, and beside each what was measured, if it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench._report import milliseconds, table
from bench.gpu._cases import CASES, GpuCase, in_the_model
from bench.gpu._cost import CHIPS, FORWARD, Chip, Cost, costs

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
    return f"Published figures: {sources}.\n\n{table(header, body)}\n\n{_where_fused_wins()}"


def needed_rate(case: GpuCase, chip: Chip) -> float:
    """The share of the published rate at which products inside a kernel are as quick as whole logits at all of it."""
    whole, fused = costs(case)[FORWARD, ""], costs(case)[FORWARD, "fused"]
    return fused.flop / chip.rate / (whole.seconds(chip) - chip.exponentials(fused.exponentials))


def _where_fused_wins() -> str:
    header = ["rows x depth x vocabulary", *(chip.name for chip in CHIPS)]
    cases = [case for case in CASES if in_the_model(case) and (FORWARD, "fused") in costs(case)]
    body = [
        ["x".join(map(str, case.shape)), *(f"{needed_rate(case, chip):.0%}" for chip in CHIPS)]
        for case in sorted(cases, key=lambda case: case.shape)
    ]
    return (
        "What share of the rate of torch's products, taken as the published one, those inside the kernel have to reach "
        f'for mode="fused" to be the quicker forward pass:\n\n{table(header, body)}'
    )


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
