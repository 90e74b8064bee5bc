"""What is measured on a GPU, run on the CPU in small: every case's contenders are right, and wrong ones are found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import _peers
from bench._case import OURS
from bench._harness import HostClock, Settings, WrongResult
from bench.gpu import _vocabulary
from bench.gpu._cases import CASES, GpuCase
from bench.gpu._cost import costs
from bench.gpu._inputs import COPIED_BYTES, IGNORED, copy_ceiling, edge_rows, make_targets
from bench.gpu._linear import FUSED
from bench.gpu._passes import passes
from bench.gpu._worker import measure_case

SMALL = {"A": (9, 64), "B": (9, 64), "C": (9, 64), "D": (9, 8, 64), "E": (4, 16)}
KINDS = {(case.op, case.work): dataclasses.replace(case, shape=SMALL[case.line]) for case in CASES}


def measure(case: GpuCase, *skip: str) -> list[dict[str, Any]]:
    return measure_case(case, "cpu", Settings(budget=1e-4, skip=("compile", *skip)), HostClock())


@pytest.mark.parametrize("case", KINDS.values(), ids=str)
def test_every_case_is_right_in_small(case: GpuCase) -> None:
    rows = measure(case, "peer")  # some of which compile, and warn as they do
    assert json.loads(json.dumps(rows)) == rows
    assert {row["impl"] for row in rows} == {"cpu"}
    assert {row["malloc"] for row in rows} == {"caching"}
    assert len({row["work"] for row in rows}) == 1
    for row in rows:
        families = {figures["family"] for figures in row["contenders"].values()}
        assert {"ours", "eager"} <= families
        assert not [name for name, why in row["skipped"].items() if "Error" in why or "wrong" in why.lower()]
        assert {verdict["of"] for verdict in row["verdicts"] if verdict["kind"] == "speedup"} >= {"eager", "compile"}


@pytest.mark.parametrize("case", KINDS.values(), ids=str)
def test_what_is_measured_is_what_the_model_reckons(case: GpuCase) -> None:
    """A pass and a mode of the one is a pass and a subject of the other; but for a mode that takes a GPU."""
    rows = measure(case)
    measured = {(row["pass"], row["subject"].removeprefix(f"{OURS}, ").removeprefix(OURS)) for row in rows}
    measured |= {(row["pass"], "fused") for row in rows if row["skipped"].get(FUSED) == "its kernel takes a GPU"}
    in_place = {key for key in measured if key[1] == "gradient in place"}
    assert measured - in_place == set(costs(case))


def test_passes_count_the_bytes_of_the_model() -> None:
    case = next(case for case in KINDS.values() if case.op == "token_stats" and case.masked == 0)
    counted = {work.name: work.nbytes for work in passes(case, "cpu")}
    logits = 9 * 64 * 2
    assert counted == {"forward": logits, "backward": 2 * logits, "forward + backward": 3 * logits}


def test_masked_rows_are_ignored_and_receive_nothing() -> None:
    case = dataclasses.replace(KINDS["token_stats", "log-prob and entropy, 60 % masked"], shape=(200, 64))
    targets = make_targets(case, 64, 2, "cpu")
    ignored = targets.labels == IGNORED
    assert int(ignored.sum()) == 120
    assert not any(bool(upstream[ignored].any()) for upstream in targets.upstream)
    assert torch.equal(targets.kept, (~ignored).nonzero().squeeze(1))
    assert int(targets.plain.min()) >= 0
    assert bool((targets.plain == targets.labels)[~ignored].all())


def test_the_last_row_is_among_those_checked() -> None:
    assert edge_rows(8192, "cpu").tolist() == [0, 1, 2, 3, 4096, 8189, 8190, 8191]
    assert edge_rows(2, "cpu").tolist() == [0, 1]


def test_a_wrong_last_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an offset overflows: all else is right."""
    right = _vocabulary.ours

    def wrong(*args: Any, **kwargs: Any) -> Any:
        form = right(*args, **kwargs)

        def run(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weights = torch.ones(len(labels)).index_fill(0, torch.tensor([len(labels) - 1]), 1.5)
            return tuple(output * weights for output in form(logits, labels))

        return run

    monkeypatch.setattr(_vocabulary, "ours", wrong)
    with pytest.raises(WrongResult, match="irlfast"):
        measure(KINDS["token_stats", "log-prob and entropy"])


def test_a_peer_that_does_not_ignore_labels_never_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def gathers(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(int(labels.min()))
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    monkeypatch.setattr(_peers, "logprob_entropy_peers", lambda device: ({"gathers": gathers}, {}))
    rows = measure(KINDS["token_stats", "log-prob and entropy, 60 % masked"])
    assert "gathers" in rows[0]["contenders"]
    assert min(seen) >= 0


def test_a_peer_that_writes_over_its_logits_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = _peers.OVERWRITES_LOGITS

    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            log_p = logits.float().log_softmax(-1)
            kept = labels != IGNORED
            value = log_p.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) * kept
            gradient = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]) - log_p.exp()
            logits.copy_(gradient * kept[:, None])
            ctx.save_for_backward(logits.detach())
            return value

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> Any:
            return ctx.saved_tensors[0] * upstream[:, None], None

    monkeypatch.setattr(_peers, "logprob_peers", lambda device: ({name: lambda x, y: (Overwrites.apply(x, y),)}, {}))
    rows = measure(KINDS["token_stats", "log-prob"])
    present = {row["pass"]: name in row["contenders"] for row in rows}
    assert present == {"forward": True, "backward": False, "forward + backward": True}
    assert "its forward is its backward" in rows[1]["skipped"][name]


def test_copies_cover_the_bytes_with_a_buffer_that_is_bounded() -> None:
    copied = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                copied.append(args[0].nbytes)
            return func(*args, **(kwargs or {}))

    ceiling = copy_ceiling(5 * COPIED_BYTES // 1024, "meta")
    with Counted():
        ceiling.run()
    assert 2 * sum(copied) == ceiling.nbytes
    large = copy_ceiling(5 * COPIED_BYTES, "meta")
    copied.clear()
    with Counted():
        (buffer,) = large.run()
    assert 2 * sum(copied) == 5 * COPIED_BYTES
    assert buffer.nbytes == COPIED_BYTES


def test_an_implementation_can_be_left_out() -> None:
    """So that "auto" takes the next; in a process of its own, whose tables it changes."""
    code = (
        "from bench.gpu._worker import leave_out; leave_out(['cuda']); from irlfast.ops import gae, token_stats as op; "
        "print(*op.__globals__['IMPLEMENTATIONS'], *gae.__globals__['IMPLEMENTATIONS'])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["cpu", "triton", "reference"] * 2
