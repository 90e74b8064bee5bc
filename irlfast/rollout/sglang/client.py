"""One SGLang server over HTTP: every wait is bounded, every reply checked, every failure of one of two kinds."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
from torch import Tensor

from .errors import SGLangError, SGLangRefused, SGLangUnreachable
from .replies import Done, Generated, ModelInfo, ServerInfo, parse

T = TypeVar("T")

# Seconds for requests that a healthy server answers at once.
_CONTROL_TIMEOUT = 30.0
_JSON = {"Content-Type": "application/json"}


class SGLangClient:
    """Asks one server. Its coroutines run in the loop that made it.

    Args:
        url: http://host:port.
        request_timeout: seconds for one request that samples, scores or loads weights, its time in the server's queue
            included.
    """

    def __init__(self, url: str, *, request_timeout: float) -> None:
        self.url = url.rstrip("/")
        self._timeout = request_timeout
        # A connection for each request under way: what bounds them is the engine.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        await self._session.close()

    async def generate(self, request: Mapping[str, Any]) -> list[Generated]:
        """The responses to a /generate request, prompt-major.

        Raises:
            SGLangUnreachable: no answer in time, or one that was aborted.
            SGLangRefused: the server refused the request.
        """
        reply = await self._ask("POST", "/generate", request, self._timeout)
        generated = parse(list[Generated], reply if isinstance(reply, list) else [reply], self.url)
        for one in generated:
            if one.meta_info.finish_reason.type == "abort":
                raise SGLangUnreachable(f"{self.url} aborted a request: {one.meta_info.finish_reason.message}")
        return generated

    async def is_ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            await self._ask("GET", "/ready", None, 5.0)
        except SGLangRefused as error:
            if error.status != 404:
                return False
            return await self._answers("/health")  # a server from before /ready existed
        except SGLangUnreachable:
            return False
        return True

    async def _answers(self, path: str) -> bool:
        try:
            await self._ask("GET", path, None, _CONTROL_TIMEOUT)
        except SGLangError:
            return False
        return True

    async def model_info(self) -> ModelInfo:
        return parse(ModelInfo, await self._ask("GET", "/model_info", None, _CONTROL_TIMEOUT), self.url)

    async def server_info(self) -> ServerInfo:
        return parse(ServerInfo, await self._ask("GET", "/server_info", None, _CONTROL_TIMEOUT), self.url)

    async def load_tensors(self, tensors: Sequence[tuple[str, Tensor]], *, version: str | None, tp_size: int) -> None:
        """Replace the named weights; prefixes cached under the old ones are forgotten.

        With a `version`, the weights have this name from now on; give it with the last tensors of an update. The server
        must know every name, and every shape must be right: an unknown name is silently ignored and a wrong shape ends
        the server, so callers check both before.
        """
        # Plain pickle: shared memory and file descriptors would tie both ends to one machine.
        blob = base64.b64encode(pickle.dumps(list(tensors), protocol=5)).decode()
        request = {"serialized_named_tensors": [blob] * tp_size, "weight_version": version, "flush_cache": True}
        await self._done("/update_weights_from_tensor", request)

    async def load_folder(self, path: str, *, version: str) -> None:
        """Replace the weights by those of a model folder that the server can read."""
        await self._done("/update_weights_from_disk", {"model_path": path, "weight_version": version})

    async def begin_update(self) -> bool:
        """Pause generation and open an update; whether the server knows sessions of updates (from 0.5.21 on)."""
        await self._optional("/pause_generation", {"mode": "retract"})
        try:
            return await self._optional("/begin_weight_update", {})
        except SGLangRefused as error:
            if "already open" not in str(error):
                raise
        await self._done("/end_weight_update", {})  # one that a trainer left open when it was killed
        return await self._optional("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Close an update that `begin_update` opened."""
        await self._done("/end_weight_update", {})

    async def go_on(self) -> None:
        """Let generation go on after `begin_update`, whatever became of the update."""
        await self._optional("/continue_generation", {})

    async def _done(self, path: str, request: Mapping[str, Any]) -> None:
        done = parse(Done, await self._ask("POST", path, request, self._timeout), self.url)
        if not done.success:
            raise SGLangRefused(f"{self.url}{path} failed: {done.message}")

    async def _optional(self, path: str, request: Mapping[str, Any]) -> bool:
        """Post to a path that older servers lack; whether this one has it."""
        try:
            await self._ask("POST", path, request, self._timeout)
        except SGLangRefused as error:
            if error.status == 404:
                return False
            raise
        return True

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        where = f"{self.url}{path}"
        # A file, which goes out in pieces: weights are too large to be written at once.
        data = None if body is None else io.BytesIO(json.dumps(body).encode())
        try:
            async with self._session.request(
                method, where, data=data, headers=_JSON, timeout=aiohttp.ClientTimeout(total=timeout)
            ) as reply:
                text = await reply.text()
                if reply.status == 503:
                    raise SGLangUnreachable(f"{where} is not ready (503)")
                if reply.status >= 400:
                    raise SGLangRefused(f"{where} answered {reply.status}: {text[:500]}", reply.status)
                return await reply.json() if reply.content_type == "application/json" else text
        except asyncio.TimeoutError as error:
            raise SGLangUnreachable(
                f"{where} gave no answer within {timeout:g} s: raise request_timeout if its queue is long, or ask for "
                "fewer tokens at once"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise SGLangUnreachable(f"{where}: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise SGLangRefused(f"{where} answered no valid JSON: {error}") from error
