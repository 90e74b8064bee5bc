"""Requests that come together share a pass, the queue is bounded, and whoever hangs up leaves it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from irlfast.data import Demonstration
from irlfast.serving import Batcher, QueueFullError, ServedReward
from irlfast.serving.batcher import Judged
from irlfast.serving.metrics import Metrics


def body(i: int) -> dict[str, str]:
    return {"prompt": "w1 w2", "response": " ".join(f"w{3 + (i + k) % 20}" for k in range(1 + i % 5))}


async def until_waiting(client: Any, rows: int) -> None:
    for _ in range(1000):
        if (await client.ask("/info")).value["waiting_rows"] == rows:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"never {rows} rows in the queue")


@pytest.mark.parametrize(
    ("gather", "parts"),
    [(8, (range(1), range(1, 9), range(9, 17), range(17, 21))), (16, (range(1), range(1, 17), range(17, 21)))],
)
def test_requests_that_come_together_are_judged_together(
    serving: Any, served: ServedReward, gated: Any, gather: int, parts: tuple[range, ...]
) -> None:
    alone = [served.judge([Demonstration(prompt="w1 w2", response=body(i)["response"])]).scores[0] for i in range(21)]
    with serving(replace(served, scorer=gated), gather=gather) as client:

        async def asked() -> list[Any]:
            gated.gate.clear()
            first = asyncio.ensure_future(client.ask("/", body(0)))
            while not gated.batches:
                await asyncio.sleep(0.005)
            rest = []
            for i in range(1, 21):  # one after another, so that their order is known
                rest.append(asyncio.ensure_future(client.ask("/", body(i))))
                await until_waiting(client, i)
            gated.gate.set()
            return await asyncio.gather(first, *rest)

        answers = client.loop.run(asked())
    assert [answer.value for answer in answers] == pytest.approx([score.normalised for score in alone], abs=1e-5)  # type: ignore[union-attr]
    # What gathered while the model was busy, in the order it came.
    assert gated.batches == [[body(i)["response"] for i in part] for part in parts]


def test_an_idle_model_waits_for_others_so_long_and_no_longer(serving: Any, served: ServedReward, gated: Any) -> None:
    with serving(replace(served, scorer=gated), batch_wait=0.8) as client:

        async def asked(count: int) -> float:
            start = asyncio.get_running_loop().time()
            await asyncio.gather(*(client.ask("/", body(i)) for i in range(count)))
            return asyncio.get_running_loop().time() - start

        assert client.loop.run(asked(3)) >= 0.8
        assert sorted(map(len, gated.batches)) == [3]
        assert client.loop.run(asked(8)) < 0.7  # a whole batch waits for nobody
        assert len(gated.batches[1]) == 8


def test_a_request_is_judged_whole_and_by_its_kind(serving: Any, served: ServedReward, gated: Any) -> None:
    many = [body(i) for i in range(30)]
    with serving(replace(served, scorer=gated)) as client:

        async def asked() -> list[Any]:
            gated.gate.clear()
            first = asyncio.ensure_future(client.ask("/", body(0)))
            while not gated.batches:
                await asyncio.sleep(0.005)
            rest, waiting = [], 0
            for path, what, rows in (
                ("/", many[:5], 5),
                ("/score?tokens=1", body(7), 1),
                ("/", many, 30),
                ("/", [], 0),
            ):
                rest.append(asyncio.ensure_future(client.ask(path, what)))
                waiting += rows
                await until_waiting(client, waiting)
            gated.gate.set()
            return await asyncio.gather(first, *rest)

        answers = client.loop.run(asked())
    assert [answer.status for answer in answers] == [200] * 5
    assert list(map(len, gated.batches)) == [1, 5, 1, 30]
    assert len(answers[3].value) == 30


def test_beyond_the_queue_a_request_is_sent_away_at_once(serving: Any, served: ServedReward, gated: Any) -> None:
    with serving(replace(served, scorer=gated), queue_size=10) as client:

        async def asked() -> tuple[list[Any], list[Any]]:
            gated.gate.clear()
            taken = [asyncio.ensure_future(client.ask("/", body(0)))]
            while not gated.batches:
                await asyncio.sleep(0.005)
            taken.append(asyncio.ensure_future(client.ask("/", [body(i) for i in range(10)])))
            await until_waiting(client, 10)
            refused = await asyncio.gather(*(client.ask("/", body(i)) for i in range(5)))  # while the model is busy
            gated.gate.set()
            return await asyncio.gather(*taken), refused

        taken, refused = client.loop.run(asked())
        assert [answer.status for answer in taken] == [200, 200]
        assert [answer.status for answer in refused] == [503] * 5
        assert refused[0].error == "10 rows wait and at most 10 may: 1 more were not taken"
        assert int(refused[0].headers["Retry-After"]) >= 1
        assert client("/", body(1)).status == 200
        assert client("/info").value["rejected_rows"] == 5
        assert 'irlfast_requests_total{path="/",status="503"} 5' in client("/metrics").value


def test_who_hangs_up_leaves_the_queue(serving: Any, served: ServedReward, gated: Any) -> None:
    with serving(replace(served, scorer=gated)) as client:

        async def asked() -> list[Any]:
            gated.gate.clear()
            first = asyncio.ensure_future(client.ask("/", body(0)))
            while not gated.batches:
                await asyncio.sleep(0.005)
            gone, stays = (asyncio.ensure_future(client.ask("/", body(i))) for i in (1, 2))
            await until_waiting(client, 2)
            gone.cancel()
            await until_waiting(client, 1)
            gated.gate.set()
            return await asyncio.gather(first, stays)

        assert [answer.status for answer in client.loop.run(asked())] == [200, 200]
    assert gated.batches[1:] == [[body(2)["response"]]]


def test_a_batcher_that_ends_leaves_nobody_waiting() -> None:
    """Regression guard: an error in the batcher itself must reach those who wait, not hang them."""

    def too_few(rows: Any, tokens: bool) -> Any:
        return Judged([], "v")._replace(scores=None)  # type: ignore[arg-type]

    async def asked() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(too_few, executor, batch_size=1, gather=1, wait=0, limit=3, metrics=Metrics())
            rows = [Demonstration(prompt="a", response="b")]
            with pytest.raises(ValueError, match="4 rows in one request, expected at most 3"):
                await batcher.submit(rows * 4)
            waiting = [asyncio.ensure_future(batcher.submit(rows)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await batcher.submit(rows)
            outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
            assert all(isinstance(outcome, TypeError) for outcome in outcomes)
            with pytest.raises(RuntimeError, match="the batcher has ended"):
                await batcher.submit(rows)
            await batcher.close()

    asyncio.run(asked())
