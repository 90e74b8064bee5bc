"""The servers of an engine: reached, brought up to date with the policy's weights, and brought back when they fail."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .client import SGLangClient
from .errors import SGLangError, SGLangRefused, SGLangUnreachable
from .replies import TokenLogprob
from .server import SGLangServer
from .weights import WeightSnapshot, buckets

logger = logging.getLogger("irlfast")


@dataclass
class Member:
    """One server. `repairs` counts how often it was brought back; `lost` says why it is given up, if it is."""

    client: SGLangClient
    server: SGLangServer | None = None
    tp_size: int = 1
    repairs: int = 0
    lost: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        return self.client.url


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the servers have to hold: a snapshot under a name of its own, or a folder that has the same."""

    name: str
    snapshot: WeightSnapshot
    folder: Path | None = None


class Fleet:
    """Servers that all hold the same weights.

    `weights` are what they have to hold, None for what they hold anyway.

    Args:
        members: the servers, started or attached to.
        reconnect_timeout: seconds to wait for a server that went away and was not started here.
        request_timeout: seconds after which a server that was started here and still runs counts as hung.
        tolerance: most that a server's log-probs of the probe may differ from the policy's, on average and as a share
            of 1 + |log-prob|.
    """

    def __init__(
        self, members: Sequence[Member], *, reconnect_timeout: float, request_timeout: float, tolerance: float
    ) -> None:
        self.members = list(members)
        self.weights: Weights | None = None
        self.restarts = 0
        self._reconnect_timeout = reconnect_timeout
        self._request_timeout = request_timeout
        self._tolerance = tolerance

    def alive(self) -> list[Member]:
        """Servers that take requests.

        Raises:
            SGLangUnreachable: there is none left, with what became of each.
        """
        alive = [member for member in self.members if member.lost is None]
        if not alive:
            reasons = "; ".join(f"{m.url}: {m.lost}" for m in self.members)
            raise SGLangUnreachable(
                f"no SGLang server is left ({reasons}). Nothing sampled was used in part: start the servers again and "
                "resume the run from its last checkpoint"
            )
        return alive

    async def push(self) -> None:
        """Give all servers `weights`, one after another so that the others go on, and check that they arrived.

        Raises:
            SGLangRefused: a server refused them, or scores the probe otherwise than the policy.
            SGLangUnreachable: no server is left.
        """
        for member in self.alive():
            await self._push_or_repair(member)
        self.alive()

    async def _push_or_repair(self, member: Member) -> None:
        seen = member.repairs
        try:
            async with member.lock:
                await self._load(member)
        except SGLangUnreachable as error:
            await self.repair(member, seen, error)  # which loads the weights

    async def repair(self, member: Member, seen: int, cause: SGLangError) -> None:
        """Bring back a server after `cause`, met when it had been repaired `seen` times: once, however many ask."""
        async with member.lock:
            if member.repairs != seen or member.lost is not None:
                return
            logger.warning("%s: bringing it back", cause)
            try:
                await self._revive(member)
                if self.weights is not None and not await self._is_current(member):
                    await self._load(member)
            except SGLangUnreachable as error:
                member.lost = str(error)
                logger.warning("giving up %s: %s", member.url, error)
            member.repairs += 1

    async def _revive(self, member: Member) -> None:
        """Wait for a server that still answers or comes back; start one of our own anew where its process ended."""
        if member.server is not None and not await self._answers_within(member, self._request_timeout):
            member.server.stop()
            await member.server.start(member.client)
            self.restarts += 1
            return
        if not await self._answers_within(member, self._reconnect_timeout):
            raise SGLangUnreachable(f"{member.url} did not come back within {self._reconnect_timeout:g} s")

    async def _answers_within(self, member: Member, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            # A port that accepts connections says little: a server whose scheduler died does for some seconds.
            if await member.client.is_ready() and await self._can_generate(member, deadline):
                return True
            if time.monotonic() > deadline or (member.server is not None and member.server.pid is None):
                return False
            await asyncio.sleep(0.5)

    async def _can_generate(self, member: Member, deadline: float) -> bool:
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        try:
            await member.client.go_on()  # an update that broke off may have left it paused
            await asyncio.wait_for(member.client.generate(body), max(1.0, deadline - time.monotonic()))
        except (SGLangUnreachable, asyncio.TimeoutError):
            return False
        return True

    async def _is_current(self, member: Member) -> bool:
        assert self.weights is not None
        return (await member.client.model_info()).weight_version == self.weights.name

    async def _load(self, member: Member) -> None:
        weights, client = self.weights, member.client
        assert weights is not None
        try:
            begun = await client.begin_update()
            try:
                if weights.folder is not None:
                    await client.load_folder(str(weights.folder), version=weights.name)
                else:
                    parts = list(buckets(weights.snapshot.tensors))
                    for i, part in enumerate(parts):
                        # Named with the last part alone: what broke off in between must not pass for the whole.
                        name = weights.name if i + 1 == len(parts) else None
                        await client.load_tensors(part, version=name, tp_size=member.tp_size)
            finally:
                if begun:
                    await client.end_update()
        finally:
            await client.go_on()
        await self._check(member, weights.snapshot)

    async def _check(self, member: Member, snapshot: WeightSnapshot) -> None:
        if snapshot.probe_logprobs is None:
            return
        found = torch.tensor((await score(member.client, snapshot.probe, len(snapshot.probe) - 1)).logprobs)
        gap = ((found - snapshot.probe_logprobs).abs() / (1.0 + snapshot.probe_logprobs.abs())).mean()
        if not float(gap) <= self._tolerance:
            raise SGLangRefused(
                f"after the update to version {snapshot.version} {member.url} scores a fixed prompt otherwise than the "
                f"policy does: by {float(gap):.2g} of each log-prob on average, expected at most {self._tolerance:g}. "
                "Does it serve this architecture, unquantised, in the policy's dtype? check_tolerance sets the bound"
            )


class Score(NamedTuple):
    """logprobs: one for each token that was asked for. weights: the name of the weights that gave them."""

    logprobs: list[float]
    weights: str


async def score(client: SGLangClient, ids: Sequence[int], count: int) -> Score:
    """Log-probs at temperature 1 of the last `count` of `ids`, each given all before it."""
    body = {
        "input_ids": list(ids), "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True, "logprob_start_len": len(ids) - count - 1,
    }  # fmt: skip
    meta = (await client.generate(body))[0].meta_info
    return Score(scored_tokens(client.url, meta.input_token_logprobs[-count:], ids[-count:]), meta.weight_version)


def scored_tokens(url: str, entries: Sequence[TokenLogprob], ids: Sequence[int]) -> list[float]:
    """The log-probs of `entries`, which have to be those of `ids`.

    Raises:
        SGLangRefused: they are of other tokens, or one is missing.
    """
    logprobs = [entry[0] for entry in entries if entry[0] is not None]
    # 0.5.23 names the last id of the vocabulary 0 here; its log-prob is right.
    same = all(entry[1] in (token, 0) for entry, token in zip(entries, ids, strict=False))
    if not same or len(logprobs) != len(ids):
        raise SGLangRefused(f"{url} scored other tokens than it was given: {list(entries)} for {list(ids)}")
    return logprobs
