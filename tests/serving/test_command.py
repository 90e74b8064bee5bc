"""`irlfast serve-reward` as a process, and who may ask it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from irlfast.cli import main
from irlfast.commands.serve_reward import ServeRewardCommand, run_serve_reward
from irlfast.data import Demonstration
from irlfast.rollout.sglang.loop_thread import LoopThread
from irlfast.serving import ServedReward

BODY = {"prompt": "w1 w2", "response": "w3 w4 w5"}


def test_only_who_has_the_token_is_answered(serving: Any) -> None:
    with serving(token="s3cret") as client:
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Bearer \udcff"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Basic eDp3cm9uZw=="},
        ):
            for path, body in (("/", BODY), ("/info", None), ("/metrics", None), ("/reload", b""), ("/nowhere", None)):
                answer = client(path, body, headers=headers)
                assert answer.status == 401, (headers, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert "s3cret" not in answer.error
        assert client("/health").status == 200
        assert client("/", BODY, headers={"Authorization": "Bearer s3cret"}).status == 200
        # All that slime and OpenRLHF can be told is a URL.
        with_password = client.url.replace("http://", "http://irlfast:s3cret@") + "/"
        assert client(with_password, BODY).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "reward.example"])
def test_other_machines_are_let_in_by_a_token_alone(host: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRLFAST_TOKEN", raising=False)
    with pytest.raises(ValueError, match="can be reached by other machines: set IRLFAST_TOKEN or --token"):
        run_serve_reward(ServeRewardCommand(reward=run, host=host))


def test_options_out_of_range_and_a_taken_port_are_told(
    run: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, words in (
        (["--batch-size", "0"], "batch_size = 0, expected at least 1"),
        (["--port", "70000"], "port = 70000, expected a port in [0, 65535]"),
        (["--batch-wait-ms", "-1"], "batch_wait_ms = -1.0, expected milliseconds from 0"),
        (["--watch", "0"], "watch = 0.0, expected seconds above 0"),
        (["--token", ""], "token = '', expected at least one character"),
        (["--port", client.url.rsplit(":", 1)[1]], "address already in use"),
    ):
        assert main(["serve-reward", "--reward", str(run), *option]) == 1
        assert words in capsys.readouterr().err
    assert main(["serve-reward", "--reward", str(run / "nowhere")]) == 1
    assert "no reward in" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_answers_what_it_took_and_ends_well(
    number: signal.Signals,
    run: Path,
    served: ServedReward,
    loop: LoopThread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("IRLFAST_TOKEN", "t")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    async def asked() -> list[tuple[int, float]]:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer t"}) as session:

            async def ask() -> tuple[int, float]:
                async with session.post(url, json=BODY) as reply:
                    assert reply.headers["Connection"] == "close"  # or its next request would be lost
                    return reply.status, await reply.json()

            async def waiting() -> int:
                try:
                    async with session.get(url + "/info") as reply:
                        return int((await reply.json())["waiting_rows"])
                except aiohttp.ClientConnectorError:
                    return -1  # it does not listen yet

            while await waiting() < 0:
                await asyncio.sleep(0.01)
            answers = [asyncio.ensure_future(ask()) for _ in range(5)]
            while await waiting() < 5:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), number)
            return await asyncio.gather(*answers)

    with ThreadPoolExecutor(1) as other_thread:
        asking = other_thread.submit(loop.run, asyncio.wait_for(asked(), 30))
        arguments = ["--port", url.rsplit(":", 1)[1], "--batch-wait-ms", "60000", "--threads", "1"]
        assert main(["serve-reward", "--reward", str(run), *arguments]) == 0
        answers = asking.result()
    (want,) = served.judge([Demonstration(**BODY)]).scores  # type: ignore[arg-type]
    assert [status for status, _ in answers] == [200] * 5
    assert [value for _, value in answers] == pytest.approx([want.normalised] * 5, abs=1e-6)  # type: ignore[union-attr]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"url": url, "version": served.version}
    ]
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
