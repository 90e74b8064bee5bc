"""What a server answers: the scorer's numbers, in the forms of slime and of OpenRLHF, or an error in words."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.data import Demonstration, Message
from irlfast.iq_scorer import IQScorer
from irlfast.scorer import RewardScorer
from irlfast.serving import LoadOptions, ServedReward, load

PAIRS = [("w1 w2", "w3 w4 w5"), ("w1 w2 w3 w4", "w9"), ("w7", "w8 w8 w8 w8 w8 w8 w8"), ("w5 w6", "w7 w8")]


def direct(served: ServedReward, *rows: Demonstration) -> list[float]:
    """The rewards by a scorer of its own, from the same folder."""
    scores = RewardScorer.from_pretrained(served.folder).score(rows)
    return [score.normalised for score in scores]  # type: ignore[union-attr, misc]


def pairs() -> list[Demonstration]:
    return [Demonstration(prompt=prompt, response=" " + response) for prompt, response in PAIRS]


def bodies() -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": " " + response, "label": None} for prompt, response in PAIRS]


def test_slime_is_answered_with_the_scorer_s_number(client: Any, served: ServedReward) -> None:
    want = direct(served, *pairs())
    for path in ("/", "/score"):
        answers = [client(path, body) for body in bodies()]
        assert [answer.status for answer in answers] == [200] * 4
        assert [answer.value for answer in answers] == pytest.approx(want, abs=1e-6)
        assert {answer.version for answer in answers} == {served.version}
    many = client("/", bodies())
    assert many.value == pytest.approx(want, abs=1e-6)
    assert client("/", []).value == []
    assert served.version.startswith("step-1-")


def test_chat_turns_go_through_the_template(client: Any, served: ServedReward) -> None:
    turns = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5"}]
    chat = Demonstration(
        prompt="", response="w6 w7", messages=tuple(Message(role=t["role"], content=t["content"]) for t in turns)
    )
    got = client("/", {"prompt": turns, "response": "w6 w7"})
    assert got.value == pytest.approx(direct(served, chat)[0], abs=1e-6)


def test_openrlhf_is_answered_as_it_reads_it(client: Any, served: ServedReward) -> None:
    # Decoded with special tokens: BOS before, EOS behind; and a prompt whose template has BOS in its text.
    query = ["<s> w1 w2 w3 w4 w5 </s>", "<s> w1 w2 w3 w4 w9"]
    prompts = ["w1 w2", "<s> w1 w2 w3 w4"]
    got = client("/get_reward", {"query": query, "prompts": prompts, "labels": [None, "x"]})
    want = direct(served, *pairs()[:2])
    assert got.value["rewards"] == pytest.approx(want, abs=1e-6)
    assert got.value["scores"] == pytest.approx([1 / (1 + math.exp(-number)) for number in want], abs=1e-6)
    raw = got.value["extra_logs"]["raw_reward"]
    assert [(value - 1.0) / 3.0 for value in raw] == pytest.approx(want, abs=1e-6)  # -2 and 4 were seen in training
    # With several addresses it sends all it has to the first one and empty lists to the others.
    empty = client("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert empty.value == {"rewards": [], "scores": [], "extra_logs": {"raw_reward": []}}


def test_an_empty_response_is_one_that_ended_at_once(client: Any, served: ServedReward) -> None:
    (score,) = RewardScorer.from_pretrained(served.folder).score(
        [Demonstration(prompt="w1", response="")], empty_responses=True
    )
    for response in ("", " ", "</s>", "</s> w3"):
        assert client("/", {"prompt": "w1", "response": response}).value == pytest.approx(score.normalised, abs=1e-6)  # type: ignore[union-attr]


def test_tokens_on_request_and_raw_rewards(client: Any, serving: Any, served: ServedReward) -> None:
    body = bodies()[0]
    (want,) = RewardScorer.from_pretrained(served.folder).score(pairs()[:1], tokens=True)
    got = client("/score?tokens=1", body).value
    assert got["tokens"] == want.tokens  # type: ignore[union-attr]
    assert got["token_rewards"] == pytest.approx(want.token_rewards, abs=1e-5)  # type: ignore[union-attr]
    assert got["reward"] == pytest.approx(want.reward, abs=1e-6)  # type: ignore[union-attr]
    assert [set(row) for row in client("/score?tokens=1", [body, body]).value] == [set(got)] * 2
    with serving(raw=True) as raw:
        assert raw("/", body).value == pytest.approx(want.reward, abs=1e-6)  # type: ignore[union-attr]
        assert raw("/info").value["answers"] == "raw"


def test_an_iq_trained_model_is_served_raw(tiny: Any, serving: Any, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-3"
    tiny.model.save_pretrained(step / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (step / "policy" / name).write_bytes((tiny.folder / name).read_bytes())
    options = {"gamma": 1.0, "temperature": 1.0, "truncated": "bootstrap", "response_length": 62}
    (step / "state.json").write_text(json.dumps({"trainer": "iq_learn", "config": options}))
    (tmp_path / "checkpoints" / "latest").write_text("step-3\n")
    (want,) = IQScorer.from_pretrained(tmp_path).score(pairs()[:1])
    served = load(LoadOptions(reward=tmp_path))
    with serving(served, folder=tmp_path) as client:
        got = client("/", bodies()[0])
        assert got.value == pytest.approx(want.reward, abs=1e-5)  # type: ignore[union-attr]
        assert got.version.startswith("step-3-")
        assert client("/info").value["kind"] == "iq"
        # One position of the 64 is for the state that has read the last token of a response that was cut.
        assert client("/", {"prompt": "w1", "response": "w2 " * 80}).error == (
            "body: 64 tokens, expected at most 63: give a shorter text"
        )
        assert client("/", {"prompt": "", "response": "w2 " * 80}).status == 200


LONE = json.dumps({"prompt": "w1", "response": "x"}).replace('"x"', '"w1 \\ud800"').encode()
BAD = [
    (b"{", 400, "the body is not JSON: Expecting property name"),
    (b"\xff\xfe\x00", 400, "the body is not JSON"),
    (b"[" * 100_000, 413, "Maximum request body size 20000 exceeded"),
    (b"[" * 19_000, 400, "the body is not JSON"),
    (3, 400, 'body: expected an object with "prompt" and "response", got int'),
    ({"response": "w1"}, 400, "body: field 'prompt' is missing; fields found: ['response']"),
    ([{"prompt": "w1", "response": "w1"}, {"prompt": "w1"}], 400, "[1]: field 'response' is missing"),
    ({"prompt": "w1", "response": None}, 400, "body: field 'response' must be a string, got NoneType None"),
    ({"prompt": 7, "response": "w1"}, 400, "body: field 'prompt' must be a string or a list of chat turns, got int"),
    ({"prompt": [], "response": "w1"}, 400, "field 'prompt' is a list without turns"),
    ({"prompt": [{"role": "w1"}], "response": "w1"}, 400, 'field \'prompt\', turn 0 must be {"role": ..., "content"'),
    (LONE, 400, "body: field 'response' has a lone surrogate at character 3"),
    ([{"prompt": "w1", "response": "w1"}] * 65, 413, "65 rows in one request, expected at most 64: send several"),
    ({"prompt": "w1", "response": "w2 " * 80}, 422, "body: 83 tokens, expected at most 64: give a shorter text"),
    ([{"prompt": "w1", "response": "w2 " * n} for n in (2, 80, 90)], 422, "[1]: 83 tokens, expected at most 64"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=[words[:30] for _, _, words in BAD])
def test_bad_input_is_refused_in_words(client: Any, body: Any, status: int, words: str) -> None:
    answer = client("/", body)
    assert answer.status == status
    assert words in answer.error


def test_other_mistakes_are_refused_in_words(client: Any) -> None:
    refusals = [
        (client("/get_reward", {"query": ["w1 w2"]}), 400, "body: field 'prompts' is missing"),
        (client("/get_reward", {"query": "w1", "prompts": ["w1"]}), 400, "'query' must be a list of strings, got str"),
        (client("/get_reward", {"query": ["w1"], "prompts": []}), 400, "1 entries in 'query' and 0 in 'prompts'"),
        (client("/get_reward", {"query": ["w1"], "prompts": [1]}), 400, "[0]: field 'prompts' must be a string"),
        (client("/get_reward", {"query": ["w1"], "prompts": ["w2"]}), 400, "[0]: the query does not hold its prompt"),
        (client("/get_reward", []), 400, 'body: expected an object with "query" and "prompts", got list'),
        (client("/score?tokens=yes", bodies()[0]), 400, "?tokens=yes, expected 0 or 1"),
        (client("/nowhere"), 404, "no /nowhere here: POST /, /score"),
        (client("/score"), 405, "GET /score, expected POST"),
        (client("/reload", {"path": "x"}), 400, 'the body must be empty, or {"reward": a folder}'),
    ]
    for answer, status, words in refusals:
        assert answer.status == status
        assert words in answer.error
    assert refusals[8][0].headers["Allow"] == "POST"
    assert client("/", bodies()[0]).status == 200  # and goes on


def test_a_prompt_without_any_token_cannot_be_judged(serving: Any, served: ServedReward) -> None:
    bare = RewardScorer.from_pretrained(served.folder)
    bare.tokenizer.chat_template = None
    with serving(replace(served, scorer=bare)) as client:
        answer = client("/", {"prompt": [{"role": "w1", "content": "w2"}], "response": "w3"})
    assert answer.status == 422
    assert "a chat needs a tokenizer with a chat template" in answer.error


def test_a_model_that_fails_fails_its_request_alone(
    serving: Any, served: ServedReward, gated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gated.fails_on = "w9"
    gated.gate.clear()
    with serving(replace(served, scorer=gated)) as client, caplog.at_level(logging.WARNING):

        async def all_at_once() -> list[Any]:
            first = asyncio.ensure_future(client.ask("/", bodies()[0]))
            while not gated.batches:
                await asyncio.sleep(0.005)
            rest = [asyncio.ensure_future(client.ask("/", body)) for body in bodies()]
            while (await client.ask("/info")).value["waiting_rows"] < 4:
                await asyncio.sleep(0.005)
            gated.gate.set()
            return await asyncio.gather(first, *rest)

        answers = client.loop.run(all_at_once())
        assert len(gated.batches[1]) == 4
    assert [answer.status for answer in answers] == [200, 200, 500, 200, 200]
    assert answers[2].error == "the reward could not be computed: RuntimeError: the model broke on it"
    assert "each is tried alone" in caplog.text
    assert "the reward model failed on a request of 1 rows" in caplog.text
    want = direct(served, *pairs())
    assert [answers[i].value for i in (1, 3, 4)] == pytest.approx([want[i] for i in (0, 2, 3)], abs=1e-6)


def test_a_reward_that_is_no_number_is_no_answer(tiny: Any, serving: Any, served: ServedReward) -> None:
    broken = RewardScorer.from_pretrained(served.folder)
    with torch.no_grad():
        next(broken.reward.parameters()).fill_(float("nan"))
    with serving(replace(served, scorer=broken)) as client:
        for path in ("/", "/score?tokens=1"):
            answer = client(path, bodies()[0])
            assert answer.status == 500
            assert "the reward of a response is nan: the reward model has diverged" in answer.error


def test_what_it_says_of_itself(serving: Any, served: ServedReward, run: Path) -> None:
    with serving() as client:
        client("/", bodies())
        client("/", {"prompt": 1, "response": ""})
        info = client("/info").value
        assert client("/health").value == {"status": "ok"}
        text = client("/metrics").value
    assert info["reward"] == str(run / "checkpoints" / "step-1" / "reward")
    assert (info["version"], info["kind"], info["answers"]) == (served.version, "mlp", "normalised")
    assert (info["rows"], info["batches"], info["waiting_rows"]) == (4, 1, 0)
    lines = text.splitlines()
    assert 'irlfast_requests_total{path="/",status="200"} 1' in lines
    assert 'irlfast_requests_total{path="/",status="400"} 1' in lines
    assert 'irlfast_batch_rows_bucket{le="2"} 0' in lines
    assert 'irlfast_batch_rows_bucket{le="4"} 1' in lines
    assert 'irlfast_batch_rows_bucket{le="+Inf"} 1' in lines
    assert f'irlfast_reward_info{{version="{served.version}"}} 1' in lines
    families = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            float(value)
            base = name.partition("{")[0]
            assert base in families or base.rsplit("_", 1)[0] in families
