"""`python -m bench gpu`: says so without a GPU; with one keeps what comes, within its time, whatever breaks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import _results
from bench.__main__ import main
from bench._case import OURS, Bar, judge
from bench._harness import Settings
from bench.gpu import _command
from bench.gpu._cases import ALLOCATOR, CASES, GpuCase
from bench.gpu._command import NO_GPU, Session, run_worker, shares

CEILINGS = {"copy_gb_per_s": 4000.0, "product_tflop_per_s": 800.0}
ORIGIN = {"command": "c", "date": "2026-01-01", "machine": "m", "gpu": "NVIDIA H200", "torch": "2.11.0"}


def row(case: dict[str, Any], ms: float = 1.0) -> dict[str, Any]:
    blank = {
        "rounds": 100, "p20_ms": ms, "p80_ms": ms, "host_us": 20.0, "gb_per_s": 2000.0, "gflop_per_s": None,
        "peak_mib": 5.0, "extra_mib": 4.0, "error": {"x": 1e-7},
    }  # fmt: skip
    contenders = {
        OURS: {**blank, "family": "ours", "median_ms": ms, "ratio": 1.0},
        "peer": {**blank, "family": "peer", "median_ms": 2 * ms, "ratio": 2.0, "gb_per_s": 1000.0},
    }
    about = {name: case[name] for name in ("line", "op", "work", "outputs", "shape", "dtype")}
    return {
        **about, "pass": "forward", "subject": OURS, "malloc": ALLOCATOR, "threads": 1, "date": "2026-01-01",
        "impl": "triton", "contenders": contenders, "skipped": {},
        "verdicts": [judge(Bar(kind="speedup", against="peer", limit=1), OURS, contenders)],
    }  # fmt: skip


class Workers:
    """Stands for processes: each has a script of what it says before it ends."""

    def __init__(self, *scripts: list[str]) -> None:
        self.scripts = list(scripts)
        self.configs: list[dict[str, Any]] = []

    def __call__(self, config: dict[str, Any], receive: Callable[[dict[str, Any]], None], deadline: float) -> str:
        config = json.loads(json.dumps(config))
        self.configs.append(config)
        cases = iter(config["cases"])
        if config["ceilings"]:
            receive({"ceilings": CEILINGS})
        for word in self.scripts.pop(0):
            if word == "rows":
                receive({"rows": [row(next(cases))]})
            elif word == "failed":
                next(cases)
                receive({"failed": "WrongResult: irlfast is wrong"})
            elif word.startswith("lost "):
                receive({"lost": word.removeprefix("lost ")})
        return "its process ended with code -11"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_command, "gpu_provenance", lambda: {"gpu": "NVIDIA H200"})


def session(
    tmp_path: Path, workers: Workers, count: int, monkeypatch: pytest.MonkeyPatch, seconds: float = 60
) -> Session:
    monkeypatch.setattr(_command, "run_worker", workers)
    result = Session(ORIGIN, str(tmp_path / "gpu.json"))
    result.measure(CASES[:count], Settings(), time.monotonic() + 60)
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--json", str(tmp_path / "a"), "--plot", str(tmp_path / "b")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{NO_GPU}\n", "")
    assert not list(tmp_path.iterdir())


def test_rows_are_kept_with_their_share_of_the_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = session(tmp_path, Workers(["rows", "rows"]), 2, monkeypatch)
    results = _results.read(tmp_path / "gpu.json")
    assert results == done.results()
    assert not done.failed
    (run,) = results["runs"].values()
    assert (run["ceilings"], run["not_measured"]) == (CEILINGS, [])
    assert [r["work"] for r in results["rows"]] == [case.work for case in CASES[:2]]
    assert {r["run"] for r in results["rows"]} == set(results["runs"])
    assert results["rows"][0]["contenders"][OURS]["of_copy"] == 0.5
    assert results["rows"][0]["contenders"]["peer"]["of_copy"] == 0.25
    assert results["rows"][0]["contenders"][OURS]["of_product"] is None


def test_shares_of_products() -> None:
    assert shares({"gb_per_s": None, "gflop_per_s": 600e3}, CEILINGS) == {"of_copy": None, "of_product": 0.75}


def test_the_file_is_written_after_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(_results, "write", lambda path, results: written.append(len(results["rows"])))
    session(tmp_path, Workers(["rows", "rows", "rows"]), 3, monkeypatch)
    assert written[:3] == [1, 2, 3]


def test_a_wrong_result_of_ours_is_named_and_the_rest_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = session(tmp_path, Workers(["rows", "failed", "rows"]), 3, monkeypatch)
    assert done.failed
    assert done.notes == [{"case": str(CASES[1]), "reason": "WrongResult: irlfast is wrong"}]
    assert len(done.rows) == 2


def test_a_process_that_dies_costs_its_case_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(["rows"], ["rows"])
    done = session(tmp_path, workers, 3, monkeypatch)
    assert done.notes == [{"case": str(CASES[1]), "reason": "its process ended with code -11"}]
    assert [len(config["cases"]) for config in workers.configs] == [3, 1]
    assert [config["ceilings"] for config in workers.configs] == [True, False]
    assert len(done.rows) == 2


def test_a_rival_that_breaks_the_gpu_is_left_out_and_its_case_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(["rows", "lost rude"], ["rows", "rows"])
    done = session(tmp_path, workers, 3, monkeypatch)
    assert not done.failed
    assert len(done.rows) == 3
    assert [len(config["cases"]) for config in workers.configs] == [3, 2]
    assert set(workers.configs[1]["settings"]["left_out"]) == {"rude"}


def test_what_was_not_reached_is_named_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(["rows"])

    def late(config: dict[str, Any], receive: Callable[[dict[str, Any]], None], deadline: float) -> str:
        workers(config, receive, deadline)
        time.sleep(0.2)
        return "ended"

    monkeypatch.setattr(_command, "run_worker", late)
    done = Session(ORIGIN, str(tmp_path / "gpu.json"))
    done.measure(CASES[:3], Settings(), time.monotonic() + 0.1)
    assert not done.failed
    assert done.notes == [{"case": str(case), "reason": "time was over"} for case in CASES[1:3]]
    (run,) = _results.read(tmp_path / "gpu.json")["runs"].values()
    assert run["not_measured"] == done.notes


def test_the_command_prints_draws_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(_command, "run_worker", Workers(["rows"], *[["rows"]] * 4))
    file, picture = tmp_path / "gpu.json", tmp_path / "gpu.png"
    assert main(["gpu", "--lines", "C", "--json", str(file), "--plot", str(picture)]) == 1
    said = capsys.readouterr().out
    assert "copy_gb_per_s 4000, product_tflop_per_s 800" in said
    assert "of copy" in said
    assert "50%" in said
    assert "not measured: C: reverse KL" in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {r["line"] for r in _results.read(file)["rows"]} == {"C"}


def test_a_machine_without_matplotlib_gets_no_picture_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_command, "run_worker", Workers(["rows"] * 5))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.gpu._plot", raising=False)
    assert main(["gpu", "--lines", "C", "--plot", str(tmp_path / "gpu.png")]) == 0
    assert "no picture: " in capsys.readouterr().out


def config_of(case: GpuCase) -> dict[str, Any]:
    return {"device": "cuda", "ceilings": True, "settings": {"skip": []}, "cases": []}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_that_fails_says_with_which_code(capfd: pytest.CaptureFixture[str]) -> None:
    messages: list[dict[str, Any]] = []
    assert run_worker(config_of(CASES[0]), messages.append, time.monotonic() + 60) == "its process ended with code 1"
    assert messages == []


# What the worker runs, on a machine without a GPU: the CPU, the host's clock, and no cache to give back.
STAND_IN = """
import torch
from bench._harness import HostClock
from bench.gpu import _worker
for name in ("synchronize", "empty_cache"):
    setattr(torch.cuda, name, lambda: None)
_worker.CudaClock = HostClock
_worker.measure_ceilings = lambda clock: {"copy_gb_per_s": 4000.0, "product_tflop_per_s": 800.0}
passes = _worker.passes
def talkative(*arguments):
    print("what a library prints")
    return passes(*arguments)
_worker.passes = talkative
_worker.main()
"""


def test_a_worker_measures_and_goes_on_after_a_case_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def stand_in(command: list[str], **rest: Any) -> Any:
        config = {**json.loads(command[-1]), "device": "cpu"}
        config["cases"][0]["dtype"] = "int8"
        command = [sys.executable, "-c", STAND_IN, json.dumps(config)]
        return start(command, **rest, stderr=subprocess.DEVNULL)

    monkeypatch.setattr(_command.subprocess, "Popen", stand_in)
    small = [dataclasses.replace(CASES[i], shape=(9, 64)) for i in (0, 1)]
    done = Session(ORIGIN, str(tmp_path / "gpu.json"))
    settings = Settings(budget=1e-4, memory=True, skip=("compile",))
    done.measure(small, settings, time.monotonic() + 60)
    assert [note["case"] for note in done.notes] == [str(small[0])]
    assert {(r["work"], r["pass"]) for r in done.rows} == {
        (small[1].work, name) for name in ("forward", "backward", "forward + backward")
    }
    assert all(figures["of_copy"] > 0 for r in done.rows for figures in r["contenders"].values())
    assert _results.read(tmp_path / "gpu.json") == done.results()


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = "import time; print('{\"rows\": []}', flush=True); time.sleep(60)"
    start = subprocess.Popen
    monkeypatch.setattr(
        _command.subprocess, "Popen", lambda command, **rest: start([sys.executable, "-c", sleeper], **rest)
    )
    monkeypatch.setattr(_command, "CASE_SECONDS", 1.0)
    messages: list[dict[str, Any]] = []
    begin = time.monotonic()
    assert "took more than 1 seconds" in run_worker(config_of(CASES[0]), messages.append, begin + 600)
    assert messages == [{"rows": []}]
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("option", ["--budget-minutes", "--budget", "--scale"])
def test_options_have_to_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", option, "0"])
    assert stopped.value.code == 2
    assert f"{option} is 0; expected a positive number" in capsys.readouterr().err


def test_the_most_telling_cases_come_first() -> None:
    assert {case.line for case in CASES[:8]} == set("ABCDE")
    first = CASES[0]
    assert (first.op, first.shape, first.dtype, first.masked) == ("token_stats", (8192, 128256), "bfloat16", 0)
    assert len({(case.op, case.work, case.shape) for case in CASES}) == len(CASES)


def test_every_shape_and_setting_is_there() -> None:
    linear = {case.shape[1:] for case in CASES if case.op == "linear_token_stats"}
    models = {(4096, 151936), (4096, 128256), (3584, 256000), (768, 50304), (1024, 151936), (2048, 248320)}
    # And what one of four ranks has of the first model's vocabulary.
    assert linear == models | {(4096, 151936 // 4)}
    assert {case.shape[1] for case in CASES if case.op == "token_stats"} == {vocab for _, vocab in models}
    assert {case.shape[0] for case in CASES if case.op == "token_stats"} == {1024, 4096, 8192, 16384, 32768, 65537}
    assert {case.masked for case in CASES} == {0, 30, 60}
    assert {case.std for case in CASES} == {1, 3}
    assert {case.softcap for case in CASES if case.op == "linear_token_stats" and case.shape[2] == 256000} == {30}
