"""A new reward takes the old one's place under load, or the old one stays and the answer says why."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.data import Demonstration
from irlfast.iq_scorer import IQScorer
from irlfast.rewards import create_reward_model
from irlfast.rewards.iq import IQReward
from irlfast.scorer import RewardScorer, TextScorer
from irlfast.serving import LoadOptions, load
from irlfast.train.checkpoint import DamagedCheckpointError

BODY = {"prompt": "w1 w2", "response": "w3 w4 w5"}
ROW = Demonstration(**BODY)


def value(folder: Path) -> float:
    (score,) = RewardScorer.from_pretrained(folder).score([ROW])
    return float(score.normalised)  # type: ignore[union-attr, arg-type]


@pytest.fixture
def growing(tiny: Any, tmp_path: Path) -> Path:
    tiny.checkpoint(tmp_path / "run", 1)
    return tmp_path / "run"


@pytest.fixture
def start(serving: Any, growing: Path) -> Callable[..., Any]:
    """A server of the run that grows."""
    return lambda **options: serving(load(LoadOptions(reward=growing, batch_size=8)), folder=growing, **options)


def test_rewards_are_exchanged_under_load_and_no_request_is_lost(start: Any, tiny: Any, growing: Path) -> None:
    want = {1: value(growing)}
    with start() as client:

        async def ask_until(stop: asyncio.Event, answers: list[Any], body: Any) -> None:
            import aiohttp

            async with aiohttp.ClientSession() as session:
                while not stop.is_set():
                    answers.append(await client.ask("/", body, session=session))

        async def asked() -> tuple[list[Any], list[Any]]:
            stop, single, many = asyncio.Event(), [], []
            tasks = [asyncio.ensure_future(ask_until(stop, single, BODY)) for _ in range(6)]
            tasks.append(asyncio.ensure_future(ask_until(stop, many, [BODY] * 20)))
            for step in range(2, 6):
                seen = len(single)
                while len(single) < seen + 20:
                    await asyncio.sleep(0.005)
                tiny.checkpoint(growing, step)
                want[step] = value(growing)
                reply = await client.ask("/reload", b"")
                assert reply.status == 200, reply.value
                assert reply.value["changed"] is True
                assert reply.version.startswith(f"step-{step}-")
            stop.set()
            await asyncio.gather(*tasks)
            return single, many

        single, many = client.loop.run(asked())
        assert 'irlfast_reloads_total{result="loaded"} 4' in client("/metrics").value
    assert len(set(want.values())) == 5
    assert {answer.status for answer in single + many} == {200}
    for answer in single:
        assert answer.value == pytest.approx(want[int(answer.version.split("-")[1])], abs=1e-5)
    for answer in many:  # all rows of a request by one reward
        assert answer.value == pytest.approx([want[int(answer.version.split("-")[1])]] * 20, abs=1e-5)
    steps = [int(answer.version.split("-")[1]) for answer in single]
    assert set(steps) >= {1, 2, 3, 4}


def test_the_language_model_is_shared_where_both_rewards_read_it(tiny: Any, growing: Path) -> None:
    first = load(LoadOptions(reward=growing))
    tiny.checkpoint(growing, 2)
    second = load(LoadOptions(reward=growing), beside=first)
    assert second.version != first.version
    assert second.scorer.language_model is first.scorer.language_model  # type: ignore[attr-defined]
    assert load(LoadOptions(reward=growing), beside=second) is second
    # States of another layer are other inputs: nothing is shared on the strength of a name.
    other = tiny.reward(7)
    other.source = type(other.source)(**{**other.source.__dict__, "layer": -2})
    other.save_pretrained(growing / "other")
    third = load(LoadOptions(reward=growing / "other"), beside=second)
    assert third.scorer.language_model is not first.scorer.language_model  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["mlp", "trajectory", "ensemble", "backbone", "iq"])
def test_a_model_that_is_loaded_beside_changes_no_answer(tiny: Any, kind: str) -> None:
    """Bug: transformers sets torch's default dtype, which is one for all threads, while it makes a model of bfloat16;
    a trajectory reward that judged at that moment took its positions in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    if kind == "iq":
        model = IQReward(tiny.model, gamma=1.0, temperature=1.0, truncated="bootstrap")
        scorer: TextScorer = IQScorer(model, tokenizer)
    else:
        source = tiny.reward(1).source
        options: dict[str, Any] = {"hidden_size": source.width(32)}
        options = {"ensemble": {"options": options}, "backbone": {"model": str(tiny.folder)}}.get(kind, options)
        torch.manual_seed(0)
        reward = create_reward_model(options, kind).eval()
        reward.source = source if kind != "backbone" else reward.source
        scorer = RewardScorer(reward, tokenizer, None if kind == "backbone" else tiny.model)
    rows = [ROW, Demonstration(prompt="w1", response="w2 w3 w4 w5 w6 w7 w8")]
    want = [score.to_json() for score in scorer.score(rows, tokens=True)]  # type: ignore[union-attr]
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = [score.to_json() for score in scorer.score(rows, tokens=True)]  # type: ignore[union-attr]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == want


def _damage(step: Path) -> None:
    weights = step / "reward" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _lose(step: Path) -> None:
    (step / "reward" / "config.json").unlink()


def _rewritten(step: Path, change: Callable[[Any], None]) -> None:
    """Saved anew without its manifest, so that nothing but loading or the test row can tell."""
    from irlfast.rewards import load_reward_model

    reward = load_reward_model(step / "reward")
    change(reward)
    reward.save_pretrained(step / "reward")
    (step / "manifest.json").unlink()


def _diverge(step: Path) -> None:
    def change(reward: Any) -> None:
        with torch.no_grad():
            next(reward.parameters()).fill_(float("nan"))

    _rewritten(step, change)


def _widen(step: Path) -> None:
    source = json.loads((step / "reward" / "config.json").read_text())["source"]
    reward = create_reward_model({"hidden_size": 50}, "mlp")
    from irlfast.rewards import ReaderConfig

    reward.source = ReaderConfig(**source)
    reward.save_pretrained(step / "reward")
    (step / "manifest.json").unlink()


@dataclass(frozen=True)
class Broken:
    how: Callable[[Path], None]
    words: str


@pytest.mark.parametrize(
    "broken",
    [
        Broken(_damage, "model.safetensors has other content than was written"),
        Broken(_lose, "no reward in"),
        Broken(_diverge, "gives a test row the reward nan: it has diverged"),
        Broken(_widen, "hidden_states have width 34, the reward model was made for 50"),
    ],
    ids=["damaged", "incomplete", "diverged", "another width"],
)
def test_a_broken_reward_leaves_the_old_one_in_service(
    start: Any, tiny: Any, growing: Path, broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    with start() as client:
        before = client("/", BODY)
        broken.how(tiny.checkpoint(growing, 2))
        reply = client("/reload", b"")
        assert reply.status == 422
        assert reply.error.startswith(f"{before.version} stays in service: ")
        assert broken.words in reply.error
        assert broken.words in caplog.text
        after = client("/", BODY)
        assert (after.value, after.version) == (before.value, before.version)
        tiny.checkpoint(growing, 3)
        assert client("/reload", b"").version.startswith("step-3-")


def test_only_rewards_of_the_run_can_be_named(start: Any, tiny: Any, growing: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    tiny.reward(9).save_pretrained(outside)
    (growing / "link").symlink_to(outside)
    tiny.checkpoint(growing, 2)
    with start() as client:
        for path in (str(outside), "../outside", "link", "checkpoints/../../outside", "/etc/passwd"):
            reply = client("/reload", {"reward": path})
            assert reply.status == 403, path
            assert "is not inside" in reply.error
        assert client("/reload", {"reward": "checkpoints/step-2"}).version.startswith("step-2-")
        assert client("/reload", {"reward": str(growing / "checkpoints" / "step-1")}).version.startswith("step-1-")
        unchanged = client("/reload", {"reward": "checkpoints/step-1/reward"})
        assert unchanged.value["changed"] is False
        assert client("/reload", {"reward": "checkpoints/step-7"}).status == 422
    with start(root=tmp_path) as client:
        assert client("/reload", {"reward": "outside"}).value["reward"] == str(outside)


def test_a_watched_run_is_followed(start: Any, tiny: Any, growing: Path, caplog: pytest.LogCaptureFixture) -> None:
    with start(watch=0.02) as client:

        async def until(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            while True:
                info: dict[str, Any] = (await client.ask("/info")).value
                if condition(info):
                    return info
                await asyncio.sleep(0.01)

        def wait(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            found: dict[str, Any] = client.loop.run(asyncio.wait_for(until(condition), 20))
            return found

        tiny.checkpoint(growing, 2)
        wait(lambda info: info["version"].startswith("step-2-"))
        damaged = tiny.checkpoint(growing.parent / "elsewhere", 3)
        _damage(damaged)
        damaged.rename(growing / "checkpoints" / "step-3")
        (growing / "checkpoints" / "latest").write_text("step-3\n")
        wait(lambda info: info["reloads"].get("refused", 0) >= 1)
        tries = client("/info").value["reloads"]["refused"]
        client.loop.run(asyncio.sleep(0.15))
        assert client("/info").value["reloads"]["refused"] == tries  # told once
        shutil.rmtree(growing / "checkpoints" / "step-3")  # `latest` names nothing now
        client.loop.run(asyncio.sleep(0.1))
        assert client("/info").value["version"].startswith("step-2-")
        assert caplog.text.count("names 'step-3', which is not a checkpoint here") == 1
        tiny.checkpoint(growing, 4)
        wait(lambda info: info["version"].startswith("step-4-"))
        # One that was asked for stays, until there is a newer one.
        assert client("/reload", {"reward": "checkpoints/step-1"}).version.startswith("step-1-")
        client.loop.run(asyncio.sleep(0.15))
        assert client("/info").value["version"].startswith("step-1-")
        tiny.checkpoint(growing, 5)
        wait(lambda info: info["version"].startswith("step-5-"))


def test_a_reward_that_changes_while_it_is_read_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import irlfast.serving.served as served

    tiny.reward(1).save_pretrained(tmp_path)
    real = served.load_scorer

    def slow(*given: Any, **named: Any) -> Any:
        scorer = real(*given, **named)
        tiny.reward(2).save_pretrained(tmp_path)
        return scorer

    monkeypatch.setattr(served, "load_scorer", slow)
    with pytest.raises(ValueError, match="changed while it was read: try again"):
        load(LoadOptions(reward=tmp_path))


@pytest.mark.parametrize("how", ["dropped", "damaged"])
def test_a_checkpoint_that_is_dropped_while_it_is_read_is_passed_over(
    tiny: Any, growing: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Bug: a server that was started beside a run that wrote checkpoints fast ended with "No such file"."""
    import irlfast.serving.served as served

    real = served.load_scorer

    def slow(folder: Path, **named: Any) -> Any:
        if folder.parent.name == "step-1":
            if how == "dropped":
                tiny.checkpoint(growing, 2)
            shutil.rmtree(folder)
        return real(folder, **named)

    monkeypatch.setattr(served, "load_scorer", slow)
    if how == "dropped":
        assert load(LoadOptions(reward=growing)).version.startswith("step-2-")
    else:  # nothing newer: it says what is wrong
        with pytest.raises(FileNotFoundError):
            load(LoadOptions(reward=growing))


def test_a_damaged_first_reward_is_not_served(growing: Path) -> None:
    _damage(growing / "checkpoints" / "step-1")
    with pytest.raises(DamagedCheckpointError, match="other content than was written"):
        load(LoadOptions(reward=growing))
