"""A server's life: the socket opened, requests answered; told to stop, it answers what it took."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from .app import AppOptions, RewardApp
from .live import LiveReward
from .metrics import Metrics
from .served import LoadOptions, ServedReward

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A server.

    Args:
        host: interface to listen on. port: 0 takes a free one.
        load: how rewards are loaded. app: what requests may ask for.
        watch: seconds between two looks for a newer reward; None never looks.
        drain: seconds that requests under way are given at the end.
    """

    host: str
    port: int
    load: LoadOptions
    app: AppOptions
    watch: float | None
    drain: float


async def serve(
    options: ServerOptions, served: ServedReward, stop: asyncio.Event, started: Callable[[dict[str, Any]], None]
) -> None:
    """Serve until `stop` is set, then answer what was taken.

    Args:
        options: the server.
        served: the first reward, as `load(options.load)` gives it.
        stop: ends it.
        started: called once it listens, with {"url", "version"}.

    Raises:
        OSError: the port is taken, or there is no such interface.
    """
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        # One thread: batches follow one another, and everything in it runs under one version.
        executor = stack.enter_context(ThreadPoolExecutor(1, "reward"))
        live = LiveReward(options.load, served, executor, metrics)
        app = RewardApp(options.app, live, executor, metrics)
        stack.push_async_callback(app.close)
        if options.watch is not None:
            watch = asyncio.get_running_loop().create_task(live.watch(options.watch))
            stack.callback(watch.cancel)
        # Who hangs up is forgotten: under load, what nobody waits for any more must not hold others up.
        runner = web.AppRunner(
            app.application(), access_log=None, handler_cancellation=True, shutdown_timeout=options.drain
        )
        await runner.setup()
        # Closes the socket, then waits for the requests under way.
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, options.host, options.port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        started({"url": f"http://{f'[{host}]' if ':' in host else host}:{port}", "version": served.version})
        await stop.wait()
        app.stop_soon()
        _log.info("stopping: %d rows wait", app.batcher.waiting)
