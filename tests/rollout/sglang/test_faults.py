"""What a real SGLang does to a run when it fails, and what becomes of the run; figures in docs/reliability.md."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_proxy import Proxy
from sglang_checks import EOS, PAD, assert_close, changed, logprobs_of

from irlfast.rollout import Rollouts, SamplingParams, SGLangEngine, SGLangError, SGLangOptions, SGLangServerEngine
from irlfast.rollout.sglang import SGLangUnreachable

QUICK = SGLangOptions(start_timeout=5.0, retries=2)


@pytest.fixture
def attach(policy: Any) -> Iterator[Callable[..., SGLangServerEngine]]:
    """A function to engines on given addresses, with the tests' policy; all are closed at the end."""
    engines: list[SGLangServerEngine] = []

    def make(*urls: str, options: SGLangOptions = QUICK) -> SGLangServerEngine:
        engines.append(SGLangServerEngine(urls, eos_token_id=EOS, pad_token_id=PAD, policy=policy, options=options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


Note = Callable[..., None]


class Sampling:
    """`engine.generate` in a thread."""

    def __init__(self, engine: SGLangServerEngine, prompts: list[list[int]], params: SamplingParams) -> None:
        self.result: Rollouts | None = None
        self.error: Exception | None = None

        def run() -> None:
            try:
                self.result = engine.generate(prompts, params)
            except Exception as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> Rollouts:
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def assert_whole(rollouts: Rollouts, prompts: list[list[int]], params: SamplingParams, policy: Any) -> None:
    """Every prompt has its responses, in order, under the policy's weights."""
    assert rollouts.groups.tolist() == [i for i in range(len(prompts)) for _ in range(params.n)]
    for row, group in enumerate(rollouts.groups.tolist()):
        assert rollouts.input_ids[row, : len(prompts[group])].tolist() == prompts[group]
    # Not less, because of long rows: at 300 tokens transformers itself is 3e-5 off float64.
    assert_close(rollouts.model_logprobs, logprobs_of(policy, rollouts), 5e-5)


def test_a_connection_cut_mid_batch_costs_no_sample(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], attach: Callable[..., SGLangServerEngine], note: Note
) -> None:
    params = SamplingParams(max_new_tokens=120, n=2)
    with Proxy(engine.server.port) as proxy:
        through = attach(proxy.url)
        through.update_weights(None, 1)
        sampling = Sampling(through, prompts, params)
        time.sleep(0.3)
        proxy.cut()
        assert proxy.dropped > 0
        time.sleep(0.5)
        proxy.restore()
        start = time.monotonic()
        assert_whole(sampling.wait(), prompts, params, policy)
        note("connection cut mid-batch", connections=proxy.dropped, seconds_after=time.monotonic() - start, lost=0)


def test_where_one_of_two_servers_stays_away_the_other_does_its_work(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], attach: Callable[..., SGLangServerEngine], note: Note
) -> None:
    params = SamplingParams(max_new_tokens=60, n=2)
    with Proxy(engine.server.port) as first, Proxy(engine.server.port) as second:
        both = attach(first.url, second.url, options=replace(QUICK, start_timeout=1.0))
        both.update_weights(None, 1)
        assert_whole(both.generate(prompts, params), prompts, params, policy)
        sampling = Sampling(both, prompts, params)
        time.sleep(0.2)
        first.cut()
        start = time.monotonic()
        assert_whole(sampling.wait(), prompts, params, policy)
        note("one of two servers gone", seconds_after=time.monotonic() - start, lost=0)
        both.update_weights(None, 2)
        assert_whole(both.generate(prompts, params), prompts, params, policy)
        second.cut()
        with pytest.raises(SGLangUnreachable, match=r"no SGLang server is left .*resume the run from its last checkp"):
            both.generate(prompts, params)


def test_slow_answers_end_in_an_error_and_leave_the_server_free(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], attach: Callable[..., SGLangServerEngine], note: Note
) -> None:
    hasty = attach(engine.server.url, options=SGLangOptions(request_timeout=0.4, retries=1, start_timeout=20.0))
    start = time.monotonic()
    with pytest.raises(SGLangUnreachable, match=r"no answer within 0.4 s.*tried 2 times"):
        hasty.generate(prompts, SamplingParams(max_new_tokens=450, n=4))
    seconds = time.monotonic() - start
    assert seconds < 60
    # What was asked for and not waited for is given up by the server too: 8 prompts, 4 responses of 450 tokens each.
    params = SamplingParams(max_new_tokens=4)
    start = time.monotonic()
    assert_whole(engine.generate(prompts, params), prompts, params, policy)
    note("answers slower than 0.4 s", seconds_to_error=seconds, seconds_to_next_batch=time.monotonic() - start)


def test_a_taken_port_is_said_at_once(
    sglang_options: SGLangOptions, stories_path: str, policy: Any, note: Note
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(SGLangError, match=rf"port {port} on 127.0.0.1 is taken"):
            SGLangEngine(
                stories_path, eos_token_id=EOS, pad_token_id=PAD, policy=policy,
                options=replace(sglang_options, port=port),
            )  # fmt: skip
        seconds = time.monotonic() - start
        assert seconds < 5
        note("port taken", seconds_to_error=seconds)


def test_no_server_and_no_interpreter_are_said(
    sglang_options: SGLangOptions, stories_path: str, policy: Any, attach: Callable[..., SGLangServerEngine]
) -> None:
    with pytest.raises(SGLangUnreachable, match=r"127.0.0.1:9/model_info: ClientConnectorError"):
        attach("http://127.0.0.1:9")
    with pytest.raises(SGLangError, match=r"cannot start /no/such/python"):
        SGLangEngine(
            stories_path, eos_token_id=EOS, pad_token_id=PAD, policy=policy,
            options=replace(sglang_options, python="/no/such/python"),
        )  # fmt: skip


def test_a_run_stops_in_words_when_its_server_is_gone_and_resumes(
    engine: SGLangEngine, shared_data: Path, stories_path: str, tmp_path: Path, monkeypatch: Any, note: Note
) -> None:
    """`irlfast bilevel` on a server that somebody takes away in the third iteration, and brings back."""
    from irlfast.commands.bilevel import BiLevelCommand, DataConfig, run_bilevel
    from irlfast.commands.engines import EngineConfig
    from irlfast.train import BiLevelConfig, BiLevelTrainer
    from irlfast.train.log import read_log

    with Proxy(engine.server.port) as proxy:
        command = BiLevelCommand(
            model=stories_path,
            demonstrations=str(shared_data / "text" / "tinystories_1000.jsonl.gz"),
            out=tmp_path / "run",
            supervised_baseline=False,
            data=DataConfig(limit=40, heldout=8),
            sampler=EngineConfig(
                engine="sglang", urls=(proxy.url,), sglang=SGLangOptions(start_timeout=1.0, retries=1)
            ),
            train=BiLevelConfig(
                iterations=4, prompts_per_step=4, eval_every=2, eval_prompts=8, checkpoint_every=1, overlap=1,
                rollout=SamplingParams(max_new_tokens=12, n=2),
            ),
        )  # fmt: skip
        step = BiLevelTrainer.policy_step

        def cut_in_the_third(self: BiLevelTrainer, experience: Any) -> dict[str, float]:
            if self.iteration == 2:
                proxy.cut()
            return step(self, experience)

        with monkeypatch.context() as patch:
            patch.setattr(BiLevelTrainer, "policy_step", cut_in_the_third)
            with pytest.raises(SGLangUnreachable, match="resume the run from its last checkpoint"):
                run_bilevel(command)
        proxy.restore()
        assert run_bilevel(replace(command, resume=True)) == 0
    rows = read_log(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert max(row["policy/lag_max"] for row in rows) == 1
    note("server gone in the third of four iterations", iterations_after_resume=len(rows))
    engine.update_weights(None, 0)


def processes_of(group: int) -> dict[int, str]:
    """Process ids and commands of a process group, zombies left out."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,stat=,command="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in table.stdout.splitlines()]
    return {int(row[0]): row[3] for row in rows if int(row[1]) == group and not row[2].startswith("Z")}


def scheduler_of(engine: SGLangEngine) -> int:
    """The process that runs the model, a child of the server's."""
    assert engine.server.pid is not None
    return next(pid for pid, command in processes_of(engine.server.pid).items() if "scheduler" in command)


def test_a_server_killed_mid_batch_is_started_again_with_the_weights_it_had(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], attach: Callable[..., SGLangServerEngine], note: Note
) -> None:
    """The whole batch comes, under the trained weights and not those of the model's folder.

    To a second engine that is attached to the same address, this is a server that somebody restarted by hand.
    """
    # More than the server holds at once, so that no machine is done with it before the kill.
    params = SamplingParams(max_new_tokens=300, n=8)
    changed(policy, 0.1)
    engine.update_weights(None, 3)
    bystander = attach(engine.server.url, options=SGLangOptions())
    bystander.update_weights(None, 7)
    engine.update_weights(None, 3)
    scheduler = scheduler_of(engine)
    sampling = Sampling(engine, prompts, params)
    time.sleep(0.5)
    os.kill(scheduler, signal.SIGKILL)
    start = time.monotonic()
    rollouts = sampling.wait()
    seconds = time.monotonic() - start
    assert engine.restarts == 1
    assert_whole(rollouts, prompts, params, policy)
    assert rollouts.versions is not None
    assert set(rollouts.versions[rollouts.response_mask].tolist()) == {3}
    note("server killed mid-batch", seconds_to_whole_batch=seconds, responses=len(rollouts), lost=0)

    start = time.monotonic()
    later = bystander.generate(prompts, SamplingParams(max_new_tokens=8))
    assert later.versions is not None
    assert set(later.versions[later.response_mask].tolist()) == {7}
    assert_close(later.model_logprobs, logprobs_of(policy, later))
    note("server restarted by hand", seconds_to_next_batch=time.monotonic() - start, lost=0)


def test_what_would_end_the_server_does_not_reach_it(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], note: Note
) -> None:
    """The three that do, each refused here; and the server that was not asked goes on."""
    state = dict(policy.state_dict())
    few = SamplingParams(max_new_tokens=4)
    cases: dict[str, Callable[[], object]] = {
        "wrong-shaped tensor": lambda: engine.update_weights({**state, "model.norm.weight": torch.zeros(63)}, 1),
        "id outside the vocabulary": lambda: engine.generate([[512]], few),
        "context overflow": lambda: engine.generate([[1] * 506], few),
    }
    for fault, call in cases.items():
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"nothing was sent|exceeds what the server takes"):
            call()
        note(fault, seconds_to_error=time.monotonic() - start, sent=False)
    assert engine.server.pid is not None
    assert_whole(engine.generate(prompts, few), prompts, few, policy)


@pytest.mark.slow
def test_a_server_ends_with_the_process_that_started_it(
    engine: SGLangEngine, sglang_options: SGLangOptions, stories_path: str, note: Note
) -> None:
    """Also where that one is killed and can do nothing about it."""
    script = (
        "import sys, time; from irlfast.rollout import SGLangEngine, SGLangOptions\n"
        "options = SGLangOptions(python=sys.argv[2], env=tuple(sys.argv[3:]), max_total_tokens=2048)\n"
        "engine = SGLangEngine(sys.argv[1], eos_token_id=1, pad_token_id=0, options=options, dtype='float32')\n"
        "print(engine.server.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, stories_path, sglang_options.python, *sglang_options.env]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        assert processes_of(group)
        start = time.monotonic()
        trainer.kill()
        while processes_of(group):
            assert time.monotonic() - start < 60, processes_of(group)
            time.sleep(0.2)
    note("trainer killed", seconds_until_its_server_is_gone=time.monotonic() - start)
