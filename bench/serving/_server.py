"""`irlfast serve-reward` as a process, by a run whose rewards are random heads on a real language model's states."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoModelForCausalLM

from irlfast.rewards import ReaderConfig, create_reward_model
from irlfast.rewards.reader import weights_digest
from irlfast.train.checkpoint import write_checkpoint


class Run:
    """A run's folder whose checkpoint N has the random reward N.

    Args:
        folder: of the run. model: folder of the language model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        language_model = AutoModelForCausalLM.from_pretrained(model)
        self._source = ReaderConfig(model=str(model.resolve()), weights=weights_digest(language_model))
        self._width = self._source.width(language_model.config.hidden_size)

    def checkpoint(self, step: int) -> Path:
        """Write it, as training does."""
        torch.manual_seed(step)
        reward = create_reward_model({"hidden_size": self._width}, "mlp")
        reward.source = self._source
        reward.normalizer.update(torch.randn(64))
        return write_checkpoint(
            self.folder / "checkpoints", step, lambda path: reward.save_pretrained(path / "reward"), keep=1000
        )


class Server:
    """A server's process, from start to end.

    Args:
        command: arguments of Python. It prints where it listens as `irlfast serve-reward` does.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError("the server did not start:\n" + "".join(self._errors))
        self.url = str(json.loads(line)["url"])

    def _read(self, stream: IO[str]) -> None:
        self._errors.extend(stream)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def cpu_seconds(self) -> float:
        """Processor time of the process so far (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str) -> Any:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, b"", method="POST"), timeout=60) as reply:
            return json.load(reply)

    def terminate(self) -> int:
        """SIGTERM, and the status it ended with."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def kill(self) -> None:
        """For a way out that something went wrong on."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
