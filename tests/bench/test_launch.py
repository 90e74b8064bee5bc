"""What a call costs over its launches is measured without a GPU, and what is measured is the ops' own launches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from bench import _launch, _results, table
from bench.__main__ import main

# Launches of a pass forward; all kernels of an op run, and nothing else is counted.
FORWARD_LAUNCHES = {
    "policy_terms": ["policy_terms_sweep", "policy_terms_report"],
    "token_logprobs": ["token_stats_forward"],
    "token_stats": ["token_stats_forward"],
    "token_kl": ["token_kl_forward"],
    "linear_token_stats, recompute": ["linear_token_stats_merge"],
    "linear_token_stats, fused": ["linear_fused_parts", "linear_fused_finish"],
    "linear_policy_ref_stats": ["linear_policy_ref_stats_merge"],
    "sequence_logprobs": ["sequence_forward"],
    "importance_weights": ["importance_forward"],
    "gae": ["gae"],
}


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    pytest.importorskip("triton")


def test_a_call_s_launches_are_those_of_its_op() -> None:
    found = {
        name: [kernel.fn.__name__ for kernel, *_ in _launch.launches_of(call.run)]
        for name, call in _launch.calls().items()
    }
    assert found == FORWARD_LAUNCHES


def test_every_pass_is_measured_and_drawn_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "launch.json"
    assert main(["launch", "--json", str(file), "--rounds", "3", "--repeat", "1"]) == 0
    results = _results.read(file)
    passes = {(row["op"], row["pass"]) for row in results["rows"]}
    assert len(passes) == 3 * len(FORWARD_LAUNCHES) - 2  # gae has no gradient
    for row in results["rows"]:
        assert row["call_us"] > row["launches_us"] > 0
    page = "<!-- launch: results/launch.json -->\nold\n<!-- end of figures -->\n"
    text = _launch.launch_table(json.loads(file.read_text()))
    assert table.fill(page, tmp_path) == f"<!-- launch: results/launch.json -->\n\n{text}\n\n<!-- end of figures -->\n"
    assert text in capsys.readouterr().out


def test_what_python_does_beside_launches_is_what_is_measured() -> None:
    """A call that does more takes longer over the same launches."""
    call = _launch.calls()["sequence_logprobs"]

    def slow() -> Sequence[Tensor]:
        sum(range(20_000))
        return call.run()

    plain, slowed = (
        next(iter(_launch.measure("x", _launch.Call(run), rounds=5, repeat=3))) for run in (call.run, slow)
    )
    assert slowed["launches"] == plain["launches"] == 1
    assert slowed["over_us"] > plain["over_us"] + 50
