"""``irlfast serve-reward``: a learned reward over HTTP, for trainers that ask a server."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from irlfast.train.config import require

from .language_model import pick_device

_TOKEN = "IRLFAST_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeRewardCommand:
    """Serve a learned reward over HTTP: JSON in, a number out, as slime's --rm-url and OpenRLHF's --reward.remote_url
    ask for it. Once it listens it prints one line of JSON with its url and the reward's version."""

    reward: Path
    """The reward's folder, a checkpoint (step-N) or the folder of a run (bilevel or iq), whose newest checkpoint is
    taken."""
    model: str | None = None
    """Folder or hub name of the language model whose states the reward reads, where it is not the one recorded with
    the reward (as for irlfast score)."""
    host: str = "127.0.0.1"
    """Interface to listen on; one that other machines reach needs a token."""
    port: int = 8600
    """Port; 0 takes a free one."""
    token: str | None = None
    """What a request has to name to be answered. The environment variable IRLFAST_TOKEN does the same and is not seen
    in the list of processes."""
    raw: bool = False
    """Answer raw rewards instead of normalised ones."""
    max_response_tokens: int | None = None
    """Longer responses are cut here and have no EOS, as in training; by default the run's own, or no limit."""
    batch_size: int = 32
    """Sequences in one pass; so many rows wait for no others."""
    gather: int = 64
    """Rows judged together at most: sorted by length, then judged in passes of `batch_size`."""
    batch_wait_ms: float = 2.0
    """How long a request waits for others while the model is idle."""
    queue_size: int = 1024
    """Rows that may wait; more are answered with 503 and Retry-After."""
    max_body_mb: float = 8.0
    """Largest body of a request, in MiB."""
    watch: float | None = None
    """Seconds between two looks for a newer reward in the same place; by default only POST /reload looks."""
    reload_root: Path | None = None
    """POST /reload may name rewards inside this folder; by default inside `reward`."""
    drain: float = 30.0
    """Seconds that requests under way are given when the server is told to stop."""
    threads: int | None = None
    """Threads of the model on a CPU; by default one for each core."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "a port in [0, 65535]")
        for name in ("batch_size", "gather", "queue_size", "threads", "max_response_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.batch_wait_ms >= 0, "batch_wait_ms", self.batch_wait_ms, "milliseconds from 0")
        require(self.max_body_mb > 0, "max_body_mb", self.max_body_mb, "MiB above 0")
        require(self.watch is None or self.watch > 0, "watch", self.watch, "seconds above 0")
        require(self.drain >= 0, "drain", self.drain, "seconds from 0")
        require(self.token != "", "token", self.token, "at least one character")


def run_serve_reward(command: ServeRewardCommand) -> int:
    """Serve until SIGTERM or SIGINT; the requests taken by then are answered. A second signal ends it at once.

    Raises:
        ValueError: an interface that other machines reach, without a token.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as cause:
        raise ImportError('serving a reward needs aiohttp: pip install "irlfast[train]"') from cause
    from irlfast.serving import AppOptions, LoadOptions, ServerOptions, load, serve

    token = command.token or os.environ.get(_TOKEN) or None
    if token is None and not _is_loopback(command.host):
        raise ValueError(
            f"host = {command.host!r} can be reached by other machines: set {_TOKEN} or --token, which every request "
            "then has to name, or listen on 127.0.0.1"
        )
    logging.basicConfig(level=logging.WARNING, format="irlfast: %(message)s")
    logging.getLogger("irlfast.serving").setLevel(logging.INFO)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    options = ServerOptions(
        host=command.host,
        port=command.port,
        load=LoadOptions(
            reward=command.reward,
            root=command.reload_root,
            model=command.model,
            device=pick_device(command.device),
            batch_size=command.batch_size,
            max_response_tokens=command.max_response_tokens,
        ),
        app=AppOptions(
            token=token,
            raw=command.raw,
            batch_size=command.batch_size,
            gather=max(command.gather, command.batch_size),
            batch_wait=command.batch_wait_ms / 1000,
            queue_size=command.queue_size,
            max_body=int(command.max_body_mb * 2**20),
        ),
        watch=command.watch,
        drain=command.drain,
    )

    async def until_a_signal() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def end(number: int, frame: object) -> None:
            for one, handler in before.items():
                signal.signal(one, handler)
            loop.call_soon_threadsafe(stop.set)

        before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
        await serve(options, served, stop, lambda said: print(json.dumps(said), flush=True))

    served = load(options.load)
    asyncio.run(until_a_signal())
    return 0


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
