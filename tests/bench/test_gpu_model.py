"""The cost model: bytes and products counted by hand, times at published figures, and what was measured beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench import _results, table
from bench.__main__ import main
from bench._case import OURS
from bench.gpu._cases import CASES, GpuCase, in_the_model
from bench.gpu._cost import CHIPS, Chip, Cost, costs, counted_flop
from bench.gpu._model import UNMEASURED, model_table, needed_rate

_, H200, _ = CHIPS


def case(op: str, shape: tuple[int, ...], work: str | None = None) -> GpuCase:
    return next(c for c in CASES if (c.op, c.shape) == (op, shape) and c.work == (work or c.work))


def test_published_figures() -> None:
    assert [(chip.name, chip.bandwidth, chip.rate) for chip in CHIPS] == [
        ("H100 SXM", 3.35e12, 989e12),
        ("H200", 4.8e12, 989e12),
        ("MI300X", 5.3e12, 1307e12),
    ]


def test_token_stats_reads_once_and_writes_once() -> None:
    found = costs(case("token_stats", (8192, 128256), "log-prob and entropy"))
    logits = 8192 * 128256 * 2
    assert {name: cost.nbytes for (name, _), cost in found.items()} == {
        "forward": logits,
        "backward": 2 * logits,
        "forward + backward": 3 * logits,
    }
    assert found["forward", ""].seconds(H200) == pytest.approx(logits / 4.8e12)


def test_masked_rows_are_not_read_but_their_gradient_is_written() -> None:
    found = costs(case("token_stats", (8192, 151936), "log-prob and entropy, 60 % masked"))
    logits = 8192 * 151936 * 2
    assert found["forward", ""].nbytes == pytest.approx(0.4 * logits)
    assert found["backward", ""].nbytes == pytest.approx(1.4 * logits)


def test_token_kl_reads_two_rows_and_writes_one_gradient() -> None:
    found = costs(case("token_kl", (8192, 128256)))
    logits = 8192 * 128256 * 2
    assert [cost.nbytes / logits for cost in found.values()] == [2, 5]


@pytest.mark.parametrize(
    ("work", "products"),
    [
        ("linear log-prob", {"": 1, "fused": 1, "keep": 3, "recompute": 4, "one pass": 3}),
        ("linear log-prob, frozen head", {"frozen": 2, "one pass": 2}),
    ],
)
def test_products_of_the_modes(work: str, products: dict[str, int]) -> None:
    rows, depth, vocab = 8192, 4096, 128256
    found = costs(case("linear_token_stats", (rows, depth, vocab), work))
    if "fused" in products:
        assert found.pop(("forward + dX + dW", "fused")).products == 4
    assert {mode: cost.products for (_, mode), cost in found.items()} == products
    assert all(cost.flop == 2 * rows * depth * vocab * cost.products for cost in found.values())


def test_a_pair_takes_two_products_forward_and_six_with_training() -> None:
    found = costs(case("linear_policy_ref_stats", (8192, 4096, 128256)))
    assert [cost.products for cost in found.values()] == [2, 6]


def test_bytes_of_a_linear_forward_pass() -> None:
    """Operands in bfloat16, the float32 logits written by the product and read by the sweep."""
    cost = costs(case("linear_token_stats", (8192, 768, 50304), "linear log-prob"))["forward", ""]
    logits = 8192 * 50304 * 4
    assert cost.operands == pytest.approx(2 * 768 * (8192 + 50304) + logits)
    assert cost.sweeps == pytest.approx(logits)


def test_products_inside_a_kernel_leave_no_logits_and_hide_no_exponential() -> None:
    found = costs(case("linear_token_stats", (8192, 768, 50304), "linear log-prob"))
    logits, operands = 8192 * 50304, 2 * 768 * (8192 + 50304)
    cost = found["forward", "fused"]
    assert (cost.sweeps, cost.operands, cost.exponentials) == (0, operands, logits)
    assert cost.seconds(H200) == pytest.approx(logits * (2 * 768 + 256) / 989e12)
    trained = found["forward + dX + dW", "fused"]
    whole = found["forward + dX + dW", "recompute"]
    assert whole.nbytes - trained.nbytes == pytest.approx(2 * 4 * logits)


def test_at_the_needed_rate_both_take_as_long() -> None:
    shallow, deep = (
        case("linear_token_stats", shape, "linear log-prob") for shape in ((8192, 768, 50304), (8192, 4096, 151936))
    )
    assert needed_rate(shallow, H200) < needed_rate(deep, H200) < 1
    slower = dataclasses.replace(costs(shallow)["forward", "fused"], flop=0)
    product = 2 * 8192 * 768 * 50304 / (needed_rate(shallow, H200) * 989e12)
    exponentials = slower.seconds(H200) - slower.operands / 4.8e12
    assert product + exponentials == pytest.approx(costs(shallow)["forward", ""].seconds(H200))


def test_masked_rows_enter_no_product() -> None:
    shape = (8192, 1024, 151936)
    whole, masked = (case("linear_token_stats", shape, f"linear log-prob{of}") for of in ("", ", 60 % masked"))
    assert all(costs(masked)[key].flop == pytest.approx(0.4 * cost.flop) for key, cost in costs(whole).items())
    # Rates count all rows all the same, whatever a contender leaves out.
    assert counted_flop(masked, "forward") == 2 * 8192 * 1024 * 151936


def test_rates_count_four_products_or_three() -> None:
    trained = case("linear_token_stats", (8192, 768, 50304), "linear log-prob")
    product = 2 * 8192 * 768 * 50304
    names = ("forward", "forward + dX", "forward + dX + dW")
    assert [counted_flop(trained, name) // product for name in names] == [1, 3, 4]


def test_sequences() -> None:
    ppo, with_kl = (costs(case("policy_terms", (1024, 8192), work)) for work in ("PPO", "PPO with k3"))
    tokens = 1024 * 8192
    assert [cost.nbytes / tokens for found in (ppo, with_kl) for cost in found.values()] == [28, 32]
    assert [cost.nbytes for cost in costs(case("importance", (512, 64))).values()] == [12 * 512 * 64]


def test_a_pass_takes_its_products_or_their_traffic_and_then_its_sweeps() -> None:
    chip = Chip(name="x", bandwidth=1e12, rate=1e15, exp2=100, source="none")
    assert Cost(sweeps=1e12, products=1, flop=2e15, operands=1e12).seconds(chip) == 3.0
    assert Cost(sweeps=1e12, products=1, flop=2e15, operands=4e12).seconds(chip) == 5.0
    assert Cost(sweeps=0, products=1, flop=2e15, operands=1e12, exponentials=1e13).seconds(chip) == 3.0


def result(
    gpu: str, subject: str = OURS, date: str = "2026-01-01", ms: float = 0.5, impl: str = "triton"
) -> dict[str, Any]:
    first = CASES[0]
    row = {
        "op": first.op, "work": first.work, "shape": list(first.shape), "dtype": first.dtype, "pass": "forward",
        "subject": subject, "impl": impl, "date": date, "run": "r", "contenders": {subject: {"median_ms": ms}},
    }  # fmt: skip
    return {"format": 1, "runs": {"r": {"gpu": gpu}}, "rows": [row]}


def measured(*results: dict[str, Any]) -> list[str]:
    """Beside each chip, of the row of the first case's forward pass."""
    (line,) = [
        line
        for line in model_table(results).splitlines()
        if line.startswith("| log-prob and entropy | 8192x128256 | forward |")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return [cells[8], cells[10], cells[12]]


def test_everything_is_unmeasured_until_it_is_measured() -> None:
    text = model_table([])
    rows = [line for line in text.splitlines() if line.startswith("| ") and "predicted" not in line]
    rows = rows[: next(i for i, line in enumerate(rows) if line.startswith("| rows x depth"))]
    assert all(line.count(UNMEASURED) == len(CHIPS) for line in rows)
    assert len(rows) == sum(len(costs(case)) for case in filter(in_the_model, CASES))


def test_a_measurement_stands_beside_its_own_chip_alone() -> None:
    assert measured(result("NVIDIA H200")) == [UNMEASURED, "0.5000", UNMEASURED]
    assert measured(result("NVIDIA H100 80GB HBM3")) == ["0.5000", UNMEASURED, UNMEASURED]
    assert measured(result("AMD Instinct MI300X OAM")) == [UNMEASURED, UNMEASURED, "0.5000"]
    assert measured(result("NVIDIA GH200 480GB")) == [UNMEASURED] * 3
    assert measured(result("NVIDIA H100 PCIe")) == [UNMEASURED] * 3
    assert measured(result("NVIDIA H200", impl="reference")) == [UNMEASURED] * 3
    assert measured(result("NVIDIA H200", subject="irlfast, gradient in place")) == [UNMEASURED] * 3


def test_the_newer_measurement_counts() -> None:
    old, new = result("NVIDIA H200"), result("NVIDIA H200", date="2026-02-01", ms=0.25)
    assert measured(old, new) == measured(new, old) == [UNMEASURED, "0.2500", UNMEASURED]


def test_a_page_has_the_model_and_what_was_measured(tmp_path: Path) -> None:
    page = "before\n<!-- model: results/gpu*.json -->\nold\n<!-- end of figures -->\nafter\n"
    assert table.fill(page, tmp_path) == (
        f"before\n<!-- model: results/gpu*.json -->\n\n{model_table([])}\n\n<!-- end of figures -->\nafter\n"
    )
    _results.write(tmp_path / "results" / "gpu-h200.json", result("NVIDIA H200"))
    assert "0.5000" in table.fill(page, tmp_path)


def test_a_page_s_plan_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--plan", "32768x4096x151936"]) == 0
    printed = capsys.readouterr().out.rstrip()
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert "\n".join(f"    {line}" for line in printed.splitlines()) in page
    with pytest.raises(SystemExit):
        main(["gpu", "--plan", "32768x4096"])
    assert "--plan is '32768x4096'; expected three numbers" in capsys.readouterr().err


def test_predictions_are_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--predict"]) == 0
    assert capsys.readouterr().out == f"{model_table([])}\n"
