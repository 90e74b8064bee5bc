"""slime's and OpenRLHF's own functions that ask for a reward, taken from their sources, ask this server."""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from irlfast.data import Demonstration


def source(variable: str, file: str) -> ast.Module:
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a checkout of the trainer")
    return ast.parse((Path(os.environ[variable]) / file).read_text(encoding="utf-8"))


def executed(nodes: list[ast.stmt], file: str) -> dict[str, Any]:
    names: dict[str, Any] = {
        "asyncio": asyncio,
        "random": random,
        "aiohttp": aiohttp,
        "logger": logging.getLogger(file),
    }
    module = ast.Module([*ast.parse("from __future__ import annotations").body, *nodes], [])
    exec(compile(module, file, "exec"), names)
    return names


@dataclass
class Sample:
    """What slime's remote_rm reads of a sample."""

    prompt: str | list[dict[str, str]]
    response: str
    label: str | None = None


def served_by(client: Any, served: Any, *pairs: tuple[str, str]) -> list[float]:
    rows = [Demonstration(prompt=prompt, response=response) for prompt, response in pairs]
    return [score.normalised for score in served.judge(rows).scores]


def test_slime_is_answered(serving: Any, served: Any) -> None:
    file = "slime/rollout/rm_hub/__init__.py"
    wanted = {"_get_shared_session", "remote_rm", "_shared_session"}
    nodes = [
        node
        for node in source("IRLFAST_SLIME", file).body
        if getattr(node, "name", getattr(getattr(node, "target", None), "id", None)) in wanted
    ]
    names = executed(nodes, file)
    pairs = [("w1 w2", " w3"), ("w1 w2", " w4 w5"), ("w6", "")]
    with serving(token="s3cret") as client:

        async def asked() -> list[Any]:
            args = SimpleNamespace(rm_url=client.url.replace("http://", "http://irlfast:s3cret@") + "/")
            samples = [*(Sample(*pair, label="7") for pair in pairs), Sample([{"role": "w1", "content": "w2"}], "w3")]
            answers = await asyncio.gather(*(names["remote_rm"](args, sample, max_retries=1) for sample in samples))
            await names["_get_shared_session"]().close()
            return answers

        *got, chat = client.loop.run(asked())
    assert got == pytest.approx(served_by(client, served, *pairs), abs=1e-6)
    assert isinstance(chat, float)


def test_openrlhf_is_answered(serving: Any, served: Any) -> None:
    file = "openrlhf/utils/agent.py"
    functions = [
        node
        for top in source("IRLFAST_OPENRLHF", file).body
        if isinstance(top, ast.ClassDef)
        for node in top.body
        if getattr(node, "name", None) == "_fetch_rewards_via_http"
    ]
    fetch = executed(list(functions), file)["_fetch_rewards_via_http"]
    with serving(token="s3cret") as client:
        url = client.url.replace("http://", "http://irlfast:s3cret@") + "/get_reward"
        executor = SimpleNamespace(reward_endpoints=[url, url])
        first, second = client.loop.run(fetch(executor, ["<s> w1 w2 w3 w4 </s>"], ["w1 w2"], [None]))
    want = served_by(client, served, ("w1 w2", "w3 w4"))
    assert first["rewards"] == first["scores"] == pytest.approx(want, abs=1e-6)
    assert second["rewards"] == []
