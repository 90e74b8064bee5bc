"""An SGLang server as a child process: started, watched, stopped, and gone when this process is."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import SGLangError
from .options import SGLangOptions

if TYPE_CHECKING:
    from .client import SGLangClient

# The child asks the kernel to end it when the thread that started it does, and turns into the server. Without that, a
# killed trainer would leave a server behind that holds its memory.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("irlfast: the process that started this server is gone")
os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *sys.argv[2:]])
"""
_STOP_TIMEOUT = 20.0


class SGLangServer:
    """One server process on the loopback interface.

    Args:
        model_path: the model to serve, a folder or a hub name.
        options: how to start it.
        device: "cuda" or "cpu"; by default "cuda" where there is one.
        dtype: SGLang's dtype: "auto", "float32", "bfloat16", "float16".

    `name` is given to the server and comes back from /model_info, so that another server on the same port is noticed.
    """

    def __init__(
        self, model_path: str, options: SGLangOptions, *, device: str | None = None, dtype: str = "auto"
    ) -> None:
        self.model_path = model_path
        self.options = options
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self.name = f"irlfast-{uuid.uuid4().hex[:12]}"
        self.port = options.port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        handle, path = tempfile.mkstemp(prefix="irlfast-sglang-", suffix=".log")
        os.close(handle)
        self.log = Path(path)

    @property
    def pid(self) -> int | None:
        """The server's process id, or None where it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self, client: SGLangClient) -> None:
        """Start it and wait until it is ready.

        Raises:
            SGLangError: the port is taken, the process ended, or it was not ready in time; with the end of its log.
        """
        if not _is_free(self.port):
            raise SGLangError(
                f"port {self.port} on 127.0.0.1 is taken: choose another port, or 0 for a free one; to use the "
                f"server that listens there, attach to it by its address, {self.url}"
            )
        python = self.options.python or sys.executable
        command = [python, "-c", _LAUNCH, str(os.getpid()), *self._arguments()]
        with self.log.open("ab") as log:
            try:
                # A session of its own, so that stopping it reaches every process that it starts.
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environment(),
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SGLangError(
                    f"cannot start {python}: {error}; give the interpreter as --rollout.python"
                ) from error
        deadline = time.monotonic() + self.options.start_timeout
        while not await client.is_ready():
            if self._process.poll() is not None:
                raise SGLangError(f"the SGLang server ended with status {self._process.returncode}:\n{self._tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise SGLangError(
                    f"the SGLang server was not ready within start_timeout = {self.options.start_timeout:g} s:\n"
                    f"{self._tail()}"
                )
            await asyncio.sleep(0.2)
        info = await client.model_info()
        if info.served_model_name != self.name:
            self.stop()
            raise SGLangError(f"another server took port {self.port} meanwhile (it serves {info.served_model_name!r})")

    def stop(self) -> None:
        """End it and all that it started; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def remove_log(self) -> None:
        """Delete the log file."""
        self.log.unlink(missing_ok=True)

    def _arguments(self) -> list[str]:
        options = self.options
        arguments = [
            "--model-path", self.model_path, "--served-model-name", self.name, "--host", "127.0.0.1",
            "--port", str(self.port), "--device", self.device, "--dtype", self.dtype,
            "--tp-size", str(options.tp_size), "--pp-size", str(options.pp_size),
            "--skip-tokenizer-init", "--enable-return-hidden-states", "--chunked-prefill-size", "-1",
        ]  # fmt: skip
        tokens = options.max_total_tokens
        if self.device == "cpu":
            # What SGLang needs on a CPU: its own attention kernels are not built for every one, an idle server would
            # spin, and without a bound the cache takes most of the machine's memory.
            arguments += ["--attention-backend", "torch_native", "--sleep-on-idle"]
            tokens = 16384 if tokens is None else tokens
        if tokens is not None:
            arguments += ["--max-total-tokens", str(tokens)]
        return [*arguments, *shlex.split(options.args)]

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self.device == "cpu":
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
            # Two processes that each take all cores wait for one another at every operation.
            environment["OMP_NUM_THREADS"] = "1"
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "0")
        for entry in self.options.env:
            name, _, value = entry.partition("=")
            environment[name] = value
        return environment

    def _tail(self, lines: int = 15) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(line[:300] for line in text[-lines:]) + f"\n(whole log: {self.log})"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
