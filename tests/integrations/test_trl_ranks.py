"""Two gloo processes share one reward: the same bits on both, and what one process would learn from all completions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import trl_ranks

WORKER = Path(__file__).parent / "trl_ranks.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> tuple[list[dict[str, Any]], Path]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder), str(policy_folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            errors = worker.communicate(timeout=120)[1]
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.mark.parametrize("run", ["True", "False", "again"])
def test_both_have_the_same_reward(found: tuple[list[dict[str, Any]], Path], run: str) -> None:
    """However different they began; "again" was resumed after step 3 and took step 4 once more."""
    (left, right), _ = found
    for name, value in left[run]["reward"].items():
        assert torch.equal(value, right[run]["reward"][name]), name
        assert torch.equal(value, left["True" if run == "again" else run]["reward"][name]), name


def test_it_is_what_one_process_learns_from_all(found: tuple[list[dict[str, Any]], Path], policy_folder: Path) -> None:
    alone = trl_ranks.make(policy_folder, seed=0, fit=False)
    given = torch.tensor(trl_ranks.train(alone, range(4), range(1, 5))).view(4, 2, 4)
    (left, right), _ = found
    for name, value in left["False"]["reward"].items():
        torch.testing.assert_close(value, alone.reward.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    assert float(left["False"]["reward"]["normalizer.count"]) == 32
    for rank, part in enumerate((left, right)):
        torch.testing.assert_close(
            torch.tensor(part["False"]["given"]).view(4, 4), given[:, rank], rtol=1e-3, atol=1e-4
        )
    apart = trl_ranks.make(policy_folder, seed=0, fit=False)  # the break: rank 0 without the other
    trl_ranks.train(apart, range(2), range(1, 5))
    change = apart.reward.state_dict()["network.2.weight"] - left["False"]["reward"]["network.2.weight"]
    assert float(change.abs().max()) > 1e-3


def test_another_number_of_processes_is_refused(found: tuple[list[dict[str, Any]], Path], policy_folder: Path) -> None:
    with pytest.raises(ValueError, match="was made by 2 processes, these are 1"):
        trl_ranks.make(policy_folder, seed=0, fit=True).load(found[1] / "saved-True")
