"""A load client in a process of its own: `python -m bench.serving._client` reads a plan from standard input.

HTTP/1.1 over connections that are kept, written by hand: it costs little beside a server on the same machine, and it
keeps every answer, which a load generator such as wrk does not. A request is one of

    answered   a whole reply came, whatever its status
    lost       it was sent, and the connection ended before a whole reply
    unsent     no connection could be had

Closed loop: each of `connections` sends its next request when the last is answered. Open loop (`rate`): requests start
at fixed times whatever the answers do, and latency counts from then, so that a slow server cannot slow its clients.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_CLOSED = (ConnectionError, asyncio.IncompleteReadError, TimeoutError)


class Reply(NamedTuple):
    """row: which of the plan's bodies. seconds: latency. began: seconds since the start of the plan."""

    row: int
    status: int
    version: str
    value: Any
    seconds: float
    began: float


@dataclass
class Outcome:
    """What became of the requests."""

    replies: list[Reply] = field(default_factory=list)
    lost: int = 0
    unsent: int = 0


class Connection:
    """One connection, opened when it is first needed and again after it ended."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)

    async def ask(self, request: bytes) -> tuple[int, str, Any]:
        """Status, version and value of the reply."""
        assert self._streams is not None
        reader, writer = self._streams
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            body = await reader.readexactly(int(headers["content-length"]))
        except _CLOSED:
            self.close()
            raise
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(head[0].split(" ")[1]), headers.get("x-irlfast-reward-version", ""), json.loads(body)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def request_bytes(host: str, port: int, body: Any) -> bytes:
    """A POST to / with a JSON body."""
    content = json.dumps(body).encode()
    head = f"POST / HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


class Load:
    """Requests of a plan: {"host", "port", "bodies", "seconds", "connections"} and, for an open loop, "rate"."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.requests = [request_bytes(plan["host"], plan["port"], body) for body in plan["bodies"]]
        self.outcome = Outcome()
        self.count = 0
        self.start = time.perf_counter()

    async def one(self, connection: Connection, began: float) -> bool:
        """Send the next request; False where there was no connection."""
        row = self.count % len(self.requests)
        self.count += 1
        try:
            await connection.open()
        except OSError:
            self.outcome.unsent += 1
            return False
        try:
            status, version, value = await connection.ask(self.requests[row])
        except _CLOSED:
            self.outcome.lost += 1
            return True
        now = time.perf_counter()
        self.outcome.replies.append(Reply(row, status, version, value, now - began, began - self.start))
        return True

    async def closed_loop(self) -> None:
        end = self.start + self.plan["seconds"]

        async def client() -> None:
            connection = Connection(self.plan["host"], self.plan["port"])
            while time.perf_counter() < end and await self.one(connection, time.perf_counter()):
                pass
            connection.close()

        await asyncio.gather(*(client() for _ in range(self.plan["connections"])))

    async def open_loop(self) -> None:
        idle = [Connection(self.plan["host"], self.plan["port"]) for _ in range(self.plan["connections"])]
        running = set()

        async def send(due: float) -> None:
            connection = idle.pop() if idle else Connection(self.plan["host"], self.plan["port"])
            await self.one(connection, due)
            idle.append(connection)

        for i in range(int(self.plan["rate"] * self.plan["seconds"])):
            due = self.start + i / self.plan["rate"]
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.ensure_future(send(due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        for connection in idle:
            connection.close()


def main() -> int:
    load = Load(json.load(sys.stdin))
    asyncio.run(load.open_loop() if "rate" in load.plan else load.closed_loop())
    outcome = load.outcome
    json.dump({"replies": outcome.replies, "lost": outcome.lost, "unsent": outcome.unsent}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
