"""docs/serving.md has the figures of the file that it names, and that file shows no request lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench.serving import _page
from bench.serving._client import Load

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = json.loads((DOCS / "results" / "serve_reward.json").read_text(encoding="utf-8"))


def test_the_page_has_the_figures_of_its_file() -> None:
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert _page.renew(page, FIGURES) == page
    with pytest.raises(ValueError, match=r"the page has no <!-- figures of serve_reward\.json -->"):
        _page.renew("a page", FIGURES)


def test_no_request_was_lost() -> None:
    exchange, overload, end = FIGURES["exchange"], FIGURES["overload"], FIGURES["end"]
    assert exchange["versions_seen"] == exchange["exchanges"] + 1
    assert exchange["lost"] == exchange["other_than_200"] == exchange["answers_unlike_their_version"] == 0
    assert overload["lost"] == overload["other_statuses"] == 0
    assert 0.05 < overload["refused_share"] < 0.95
    assert end["lost"] == end["other_than_200"] == end["exit_status"] == 0


@pytest.mark.parametrize("rate", [None, 200.0])
def test_the_client_tells_answers_from_refusals_and_losses(rate: float | None) -> None:
    """A server that answers, refuses, and hangs up on every third request."""

    async def measured() -> Load:
        asked = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    assert json.loads(await reader.readexactly(size)) == {"prompt": "a"}
                    asked += 1
                    if asked % 3 == 0:
                        return
                    status = "200 OK" if asked % 3 == 1 else "503 Service Unavailable"
                    writer.write(
                        f"HTTP/1.1 {status}\r\nX-Irlfast-Reward-Version: v\r\nContent-Length: 3\r\n\r\n0.5".encode()
                    )
            except asyncio.IncompleteReadError:
                pass  # the client is done
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        plan = {"host": "127.0.0.1", "port": port, "bodies": [{"prompt": "a"}], "seconds": 0.15, "connections": 1}
        load = Load(plan if rate is None else {**plan, "rate": rate})
        await (load.closed_loop() if rate is None else load.open_loop())
        assert load.count == asked
        server.close()
        await server.wait_closed()
        return load

    load = asyncio.run(measured())
    replies = load.outcome.replies
    assert load.count == len(replies) + load.outcome.lost
    assert load.count == 30 if rate else load.count > 10
    assert abs(load.outcome.lost - load.count / 3) < 1
    assert {reply.status for reply in replies} == {200, 503}
    assert {(reply.version, reply.value) for reply in replies} == {("v", 0.5)}
    assert all(reply.seconds > 0 for reply in replies)
