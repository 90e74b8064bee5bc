"""The server's routes, who may use them, and errors in words.

    POST /  and  /score      slime's form, one object or a list; ?tokens=1 for everything a Score has
    POST /get_reward         OpenRLHF's form
    POST /reload             the newest reward, or {"reward": PATH}
    GET  /health /info /metrics

Every error is {"error": ...}: 400 for a body that is not of its form, 401 without the token, 403 for a reward from
elsewhere, 404, 405, 413 for more than is taken at once, 422 for a text that cannot be judged or a reward that cannot be
loaded, 500 for a reward model that failed, 503 with Retry-After where the queue is full.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from irlfast.data import DataError, Demonstration
from irlfast.scorer import Score

from .batcher import Batcher, QueueFullError
from .live import LiveReward, ReloadError
from .metrics import CONTENT_TYPE, Metrics
from .requests import openrlhf_answer, openrlhf_rows, parse_json, score_rows
from .served import kind

VERSION_HEADER = "X-Irlfast-Reward-Version"

_log = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """What requests may ask for.

    Args:
        token: what a request has to name (but for /health), or None where anyone may ask.
        raw: answer raw rewards.
        batch_size, gather: as for Batcher. batch_wait: seconds that a request waits for others while the model is idle.
        queue_size: rows that may wait.
        max_body: bytes of a request's body.
    """

    token: str | None
    raw: bool
    batch_size: int
    gather: int
    batch_wait: float
    queue_size: int
    max_body: int


class RewardApp:
    """The handlers. Made in the event loop that serves them; `close` it there.

    Args:
        options: what requests may ask for.
        live: the reward.
        executor: the one thread that judges.
        metrics: shared with `live`.
    """

    def __init__(self, options: AppOptions, live: LiveReward, executor: Executor, metrics: Metrics) -> None:
        self.options = options
        self.live = live
        self.metrics = metrics
        self._stopping = False
        self.batcher = Batcher(
            live.judge,
            executor,
            batch_size=options.batch_size,
            gather=options.gather,
            wait=options.batch_wait,
            limit=options.queue_size,
            metrics=metrics,
        )

    def application(self) -> web.Application:
        """To be run by aiohttp."""
        app = web.Application(middlewares=[self._outermost], client_max_size=self.options.max_body)
        app.add_routes(
            [
                web.post("/", self.score),
                web.post("/score", self.score),
                web.post("/get_reward", self.get_reward),
                web.post("/reload", self.reload),
                web.get("/health", self.health),
                web.get("/info", self.info),
                web.get("/metrics", self.prometheus),
            ]
        )
        return app

    def stop_soon(self) -> None:
        """From now on answers say that their connections end, and what waits is judged without delay."""
        self._stopping = True
        self.batcher.hurry()

    async def close(self) -> None:
        """Stop judging."""
        await self.batcher.close()

    async def score(self, request: web.Request) -> web.Response:
        """POST / and /score."""
        tokens = _flag(request, "tokens")
        rows, many = score_rows(parse_json(await request.read()))
        scores, version = await self._judge(rows, tokens)
        raw = self.options.raw
        answers: list[Any] = [score.served(raw=raw) for score in scores]
        if tokens:
            answers = [score.to_json() for score in scores]
        return _json(answers if many else answers[0], version=version)

    async def get_reward(self, request: web.Request) -> web.Response:
        """POST /get_reward."""
        rows = openrlhf_rows(parse_json(await request.read()))
        scores, version = await self._judge(rows, False)
        return _json(openrlhf_answer(scores, raw=self.options.raw), version=version)

    async def reload(self, request: web.Request) -> web.Response:
        """POST /reload."""
        body = await request.read()
        asked = parse_json(body) if body.strip() else {}
        if not isinstance(asked, Mapping) or not isinstance(asked.get("reward", ""), str) or asked.keys() - {"reward"}:
            raise DataError('the body must be empty, or {"reward": a folder}')
        try:
            changed = await self.live.reload(Path(asked["reward"]) if "reward" in asked else None)
        except ReloadError as error:
            stays = self.live.served.version
            return _error(403 if error.forbidden else 422, f"{stays} stays in service: {error}", version=stays)
        served = self.live.served
        return _json({"changed": changed, **self._served()}, version=served.version)

    async def health(self, request: web.Request) -> web.Response:
        """GET /health."""
        return _json({"status": "ok"}, version=self.live.served.version)

    async def info(self, request: web.Request) -> web.Response:
        """GET /info."""
        options = self.options
        said = {
            **self._served(),
            "answers": "raw" if options.raw else "normalised",
            "rows": int(self.metrics.batch_rows.sum),
            "batches": self.metrics.batch_rows.count,
            "waiting_rows": self.batcher.waiting,
            "rejected_rows": self.metrics.rejected_rows,
            "reloads": dict(self.metrics.reloads),
            "batch_size": options.batch_size,
            "gather": options.gather,
            "queue_size": options.queue_size,
        }
        return _json(said, version=self.live.served.version)

    async def prometheus(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        text = self.metrics.text(waiting=self.batcher.waiting, version=self.live.served.version)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _judge(self, rows: list[Demonstration], tokens: bool) -> tuple[list[Score], str]:
        if not rows:
            return [], self.live.served.version
        if len(rows) > self.batcher.limit:
            raise web.HTTPRequestEntityTooLarge(
                self.batcher.limit,
                len(rows),
                text=f"{len(rows)} rows in one request, expected at most {self.batcher.limit}: send several requests",
            )
        judged = await self.batcher.submit(rows, tokens=tokens)
        refused = [str(score) for score in judged.scores if isinstance(score, DataError)]
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise web.HTTPUnprocessableEntity(text=refused[0] + more)
        return [score for score in judged.scores if not isinstance(score, DataError)], judged.version

    def _served(self) -> dict[str, Any]:
        served = self.live.served
        return {
            "reward": str(served.folder),
            "version": served.version,
            "kind": kind(served.scorer),
            "loaded": round(served.loaded, 3),
        }

    @web.middleware
    async def _outermost(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        start = time.perf_counter()
        response = await self._answered(request, handler)
        if self._stopping:
            response.force_close()
        resource = request.match_info.route.resource
        path = "other" if resource is None else resource.canonical
        self.metrics.requests[path, response.status] += 1
        self.metrics.request_seconds.observe(time.perf_counter() - start)
        return response

    async def _answered(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path != "/health" and not self._may(request):
            answer = _error(401, "give the server's token: Authorization: Bearer TOKEN, or as the password in the URL")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        try:
            return await handler(request)
        except DataError as error:
            return _error(400, str(error))
        except QueueFullError as error:
            answer = _error(503, str(error))
            answer.headers["Retry-After"] = str(error.retry_after)
            return answer
        except web.HTTPException as error:
            answer = _error(error.status, _words(error, request))
            if isinstance(error, web.HTTPMethodNotAllowed):
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except Exception as error:
            _log.exception("%s %s", request.method, request.path)
            return _error(500, f"the reward could not be computed: {type(error).__name__}: {error}")

    def _may(self, request: web.Request) -> bool:
        token = self.options.token
        if token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            # What clients send that can be given a URL alone: http://name:TOKEN@host/
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "0")
    if value not in ("0", "1"):
        raise DataError(f"?{name}={value}, expected 0 or 1")
    return value == "1"


def _words(error: web.HTTPException, request: web.Request) -> str:
    if isinstance(error, web.HTTPNotFound):
        return f"no {request.path} here: POST /, /score, /get_reward, /reload; GET /health, /info, /metrics"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{request.method} {request.path}, expected {' or '.join(sorted(error.allowed_methods))}"
    return error.text or error.reason


def _json(value: Any, *, status: int = 200, version: str | None = None) -> web.Response:
    body = json.dumps(value, allow_nan=False).encode()
    response = web.Response(body=body, status=status, content_type="application/json")
    if version is not None:
        response.headers[VERSION_HEADER] = version
    return response


def _error(status: int, message: str, *, version: str | None = None) -> web.Response:
    return _json({"error": message}, status=status, version=version)
