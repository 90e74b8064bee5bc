"""Kill -9 at ten random moments of a run, resume each: the same log and the same bits as a run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import irlfast
from irlfast.train.checkpoint import verify_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked from a process that has imported")
KILLS, ITERATIONS = 10, 12

# Imports once, and forks a run for each line of its input: "start FOLDER" or "resume FOLDER". A run is a small one with
# everything that carries state: PPO with a critic in shuffled minibatches, schedules, a warm-up, dropout in the reward.
DRIVER = """
import os, sys, traceback
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from irlfast.demo.toy import make_toy_trainer, toy_config
from irlfast.eval.toy import ToyFeatures
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelTrainer, OptimizerConfig, PolicyConfig, checkpoint
from irlfast.train.config import CriticConfig

checkpoint._sync = lambda path: None  # most of a small run's time, and of use after a power cut alone
base = toy_config(0)
config = replace(
    base, iterations=12, reward_steps=2, reward_warmup_steps=3, prompts_per_step=12, eval_every=5, eval_prompts=8,
    checkpoint_every=2, rollout=SamplingParams(max_new_tokens=5, n=12),
    policy=PolicyConfig(
        kind="ppo", advantage="gae", epochs=2, minibatches=2, critic=CriticConfig(lam=0.9),
        optimizer=OptimizerConfig(lr=0.05, warmup_steps=7, schedule="cosine", weight_decay=0.01),
    ),
)

def make(out):
    toy = make_toy_trainer(0, config)
    torch.manual_seed(5)
    reward = RewardModel(RewardModelConfig(hidden_size=5, hidden_sizes=(8,), dropout=0.2))
    return BiLevelTrainer(
        policy=toy.policy, engine=toy.engine, reward=reward, demonstrations=toy.draws._items, heldout=toy.heldout,
        config=config, pad_token_id=toy.pad_token_id, out=out, features=ToyFeatures(),
    )

def run(how, out):
    trainer = make(Path(out))
    if how == "resume":
        trainer.resume()
    trainer.train()

make(None).train()  # what torch imports when it is first needed, the runs then have

for line in sys.stdin:
    how, out = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            run(how, out)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Driver:
    """Starts runs and waits for them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def start(self, how: str, out: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{how} {out}\n")
        self._process.stdin.flush()
        return self._line()

    def status(self) -> int:
        return self._line()


@contextmanager
def driver(folder: Path) -> Iterator[Driver]:
    script = folder / "driver.py"
    script.write_text(DRIVER)
    # The child imports the irlfast that is tested here, wherever it was started from.
    path = [str(Path(irlfast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            yield Driver(process)
        finally:
            process.kill()
            process.communicate()


def outcome(out: Path) -> tuple[list[str], dict[str, Any]]:
    """The log without the seconds, and what the last checkpoint holds."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    text = [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows]
    last = out / "checkpoints" / f"step-{ITERATIONS}"
    verify_checkpoint(last)
    files = {str(p.relative_to(last)): p for p in last.rglob("*") if p.is_file() and p.name != "manifest.json"}
    # How torch.save lays out equal values depends on which of them are one object.
    return text, {
        name: torch.load(path, weights_only=True) if path.suffix == ".pt" else path.read_bytes()
        for name, path in files.items()
    }


def first_checkpoint(out: Path) -> float:
    """Wait until the run has one; when that was."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline, f"no checkpoint in {out} after two minutes"
        time.sleep(0.005)
    return time.monotonic()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_each_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    draw = random.Random(20)
    with driver(tmp_path) as runs:
        runs.start("start", tmp_path / "whole")
        began = first_checkpoint(tmp_path / "whole")
        assert runs.status() == 0, (tmp_path / "errors").read_text()
        duration = time.monotonic() - began
        whole = outcome(tmp_path / "whole")
        assert len(whole[0]) > ITERATIONS
        killed, attempts = 0, 0
        while killed < KILLS:
            attempts += 1
            assert attempts < 4 * KILLS, f"only {killed} of {attempts} runs were hit before their end"
            out = tmp_path / f"run{attempts}"
            pid = runs.start("start", out)
            first_checkpoint(out)  # before it there is nothing to resume from
            time.sleep(draw.uniform(0.0, duration))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status = runs.status()
            if status == 0:
                continue  # it had ended
            assert os.WTERMSIG(status) == signal.SIGKILL, (tmp_path / "errors").read_text()
            runs.start("resume", out)
            assert runs.status() == 0, (tmp_path / "errors").read_text()
            rows, state = outcome(out)
            assert rows == whole[0]
            assert state.keys() == whole[1].keys()
            assert not [name for name, value in state.items() if not same(value, whole[1][name])]
            killed += 1
