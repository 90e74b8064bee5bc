"""A server that gives what answers a test wants of it; it proves nothing of SGLang."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from aiohttp import web


class StandIn:
    """Answers a path with its entry in `answers`, a status and a body, or a function from a request's body to them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {
            "/model_info": (200, {"model_path": "m", "model_type": "llama", "weight_version": "default"}),
            "/server_info": (200, {"version": "0.5.12", "tp_size": 2}),
        }
        self.url = ""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait(10)

    def _serve(self, ready: threading.Event) -> None:
        async def reply(ask: Any) -> Any:
            given = await ask.json() if ask.can_read_body else {}
            self.asked.append((ask.path, given))
            answer = self.answers.get(ask.path, (404, {"detail": "Not Found"}))
            status, body = answer(given) if callable(answer) else answer
            return web.Response(text=body) if isinstance(body, str) else web.json_response(body, status=status)

        async def start() -> None:
            application = web.Application(client_max_size=1 << 26)
            application.router.add_route("*", "/{path:.*}", reply)
            self._runner = web.AppRunner(application)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
            ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
