"""Answers that no SGLang gives, from a stand-in that gives them; what a real one does is in test_real_server.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stand_in import StandIn

from irlfast.rollout import SamplingParams, SGLangOptions, SGLangServerEngine
from irlfast.rollout.sglang import SGLangRefused, SGLangUnreachable
from irlfast.rollout.sglang.replies import Generated, ModelInfo, parse
from irlfast.rollout.sglang.sampled import Response, refuse_raw_logprobs, request, response


@pytest.fixture
def engine(stand_in: StandIn, make_lm: Callable[[str], torch.nn.Module]) -> Iterator[SGLangServerEngine]:
    options = SGLangOptions(retries=1, start_timeout=0.5, request_timeout=2.0)
    engine = SGLangServerEngine(
        [stand_in.url], eos_token_id=2, pad_token_id=0, policy=make_lm("llama"), options=options
    )
    yield engine
    engine.close()


def reply(ids: list[int], **meta: Any) -> dict[str, Any]:
    logprobs = [[-1.0, i, None] for i in ids]
    full = {"finish_reason": {"type": "length"}, "weight_version": "default", "output_token_logprobs": logprobs}
    return {"output_ids": ids, "meta_info": {**full, **meta}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"text": "hello"}), r"answered something that is no SGLang reply: 0.output_ids: Field required"),
        ((200, "<html>"), r"no SGLang reply"),
        ((200, reply([3, 4], output_token_logprobs=[[-1.0, 3, None], [-1.0, 5, None]])), "do not belong to output_ids"),
        ((200, [reply([3, 4, 5])] * 2), "ended a response after 3 of 4 tokens on token 5, which is none of"),
        ((200, [reply([3, 4, 5, 6], output_token_logprobs=[])] * 2), "4 tokens and 0 log-probs"),
        ((200, [reply([3, 4, 5, 6])] * 3), "gave 3 responses, asked for 2"),
        ((400, {"error": {"message": "no such field"}}), r"answered 400: .*no such field"),
        ((500, {"error": "boom"}), r"answered 500: .*boom"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused_in_words(
    stand_in: StandIn, engine: SGLangServerEngine, answer: tuple[int, Any], message: str
) -> None:
    stand_in.answers["/generate"] = answer
    with pytest.raises(SGLangRefused, match=message):
        engine.generate([[5]], SamplingParams(max_new_tokens=4, n=2))
    assert [path for path, _ in stand_in.asked].count("/generate") == 1  # asking again would change nothing


@pytest.mark.parametrize("answer", [(503, {}), (200, reply([], finish_reason={"type": "abort", "message": "full"}))])
def test_what_may_pass_is_asked_again_and_then_reported(
    stand_in: StandIn, engine: SGLangServerEngine, answer: tuple[int, Any]
) -> None:
    stand_in.answers["/ready"] = (200, {})
    stand_in.answers["/generate"] = answer
    with pytest.raises(SGLangUnreachable, match=r"did not come back within 0.5 s|resume the run"):
        engine.generate([[5]], SamplingParams(max_new_tokens=4))
    assert [path for path, _ in stand_in.asked].count("/generate") > 1


def test_an_older_server_takes_updates_without_a_session_and_answers_without_masks(
    stand_in: StandIn, engine: SGLangServerEngine
) -> None:
    """No begin, end, pause, spans or renormalised log-probs, as before 0.5.21; two tensor-parallel ranks."""
    stand_in.answers["/update_weights_from_tensor"] = (200, {"success": True, "message": ""})
    assert engine.policy is not None
    engine.update_weights(engine.policy.state_dict(), 4)
    paths = [path for path, _ in stand_in.asked]
    assert {"/pause_generation", "/begin_weight_update", "/continue_generation"} <= set(paths)
    assert "/end_weight_update" not in paths
    sent = next(body for path, body in stand_in.asked if path == "/update_weights_from_tensor")
    assert len(sent["serialized_named_tensors"]) == 2
    assert sent["flush_cache"] is True
    stand_in.answers["/generate"] = (200, [reply([3, 4], weight_version=sent["weight_version"])])
    with pytest.warns(UserWarning, match="no log-probs renormalised after top-k and top-p"):
        rollouts = engine.generate([[5]], SamplingParams(max_new_tokens=2, top_p=0.9))
    assert rollouts.versions.tolist() == [[0, 4, 4]]


def test_an_update_that_fails_says_so_and_lets_generation_go_on(stand_in: StandIn, engine: SGLangServerEngine) -> None:
    stand_in.answers["/begin_weight_update"] = stand_in.answers["/end_weight_update"] = (200, {"success": True})
    stand_in.answers["/update_weights_from_tensor"] = (200, {"success": False, "message": "out of memory"})
    assert engine.policy is not None
    with pytest.raises(SGLangRefused, match="failed: out of memory"):
        engine.update_weights(engine.policy.state_dict(), 4)
    assert [path for path, _ in stand_in.asked][-2:] == ["/end_weight_update", "/continue_generation"]
    assert engine.version == 0


def test_an_update_that_somebody_left_open_is_closed_first(stand_in: StandIn, engine: SGLangServerEngine) -> None:
    """A trainer that was killed while it updated a server: the next one must get by it."""
    stand_in.answers["/end_weight_update"] = (200, {"success": True})
    stand_in.answers["/begin_weight_update"] = (400, {"success": False, "message": "a session is already open"})
    assert engine.policy is not None
    with pytest.raises(SGLangRefused, match="already open"):
        engine.update_weights(engine.policy.state_dict(), 4)
    begun = [path for path, _ in stand_in.asked if "weight_update" in path]
    assert begun == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
    assert stand_in.asked[-1][0] == "/continue_generation"


def test_a_server_of_another_architecture_is_refused(stand_in: StandIn, make_lm: Callable[..., Any]) -> None:
    with pytest.raises(SGLangRefused, match=r"serves a llama model .*; the policy is a qwen3"):
        SGLangServerEngine([stand_in.url], eos_token_id=2, pad_token_id=0, policy=make_lm("qwen3"))


def test_a_closed_engine_says_so(stand_in: StandIn, engine: SGLangServerEngine) -> None:
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate([[5]], SamplingParams(max_new_tokens=4)),
        lambda: engine.update_weights(None, 1),
        lambda: engine.update_weights_from_disk(".", 1),
    ):
        with pytest.raises(RuntimeError, match="this engine was closed"):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eos_token_id": 64}, r"eos_token_id = 64 is outside the vocabulary \[0, 64\)"),
        ({"eos_token_id": []}, "eos_token_id is empty"),
        ({"pad_token_id": None}, "pad_token_id = None is outside"),
        ({"policy": None}, "neither policy nor config"),
        ({"urls": []}, "urls is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    stand_in: StandIn, make_lm: Callable[..., Any], given: dict[str, Any], message: str
) -> None:
    settings = {"urls": [stand_in.url], "eos_token_id": 2, "pad_token_id": 0, "policy": make_lm("llama"), **given}
    with pytest.raises(ValueError, match=message):
        SGLangServerEngine(settings.pop("urls"), **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_size": 0}, "tp_size must be at least 1, got 0"),
        ({"max_total_tokens": 0}, "max_total_tokens must be at least 1"),
        ({"port": 65536}, "port must be in"),
        ({"request_timeout": 0.0}, "request_timeout must be above 0"),
        ({"env": ("A",)}, "env entry 'A' has no '='"),
    ],
)
def test_options_out_of_their_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGLangOptions(**given)


def test_truncated_sampling_asks_for_the_kept_tokens() -> None:
    plain = request([5, 6], SamplingParams(n=3), eos=[2], vocab_size=64)
    assert plain["input_ids"] == [5, 6]
    assert plain["sampling_params"]["n"] == 3
    assert "return_sampling_mask" not in plain
    # An open top_k is closed as far out as the server allows, and a prompt is given n times.
    cut = request([5, 6], SamplingParams(n=3, top_p=0.9), eos=[2], vocab_size=64)
    assert cut["input_ids"] == [[5, 6]] * 3
    assert (cut["return_sampling_mask"], cut["sampling_params"]["top_k"]) == (True, 63)
    large = request([5], SamplingParams(top_p=0.9), eos=[2], vocab_size=150_000)
    assert large["sampling_params"]["top_k"] == 4096
    greedy = request([5], SamplingParams(temperature=0.0, top_p=0.9), eos=[2], vocab_size=64)
    assert "return_sampling_mask" not in greedy


def test_each_token_has_the_version_of_its_span() -> None:
    spans = [{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 1, "end": 3}]
    got = parse(Generated, reply([3, 4, 2], weight_versions=spans, weight_version="b"), "u")
    assert response([5], got, SamplingParams(max_new_tokens=3), eos=[2]).versions == ["a", "b", "b"]
    assert response([5], got, SamplingParams(max_new_tokens=3), eos=[2]).finish == "stop"


def test_logprobs_without_the_temperature_are_noticed() -> None:
    def rows(shift: float) -> list[Response]:
        values = [-0.5 - 0.1 * i for i in range(9)]
        return [
            Response(
                prompt=[1], ids=[3] * 9, finish="length", sampler=values, model=[v + shift for v in values],
                versions=["a"] * 9, scored=values,
            )
        ]  # fmt: skip

    refuse_raw_logprobs(rows(0.2))
    with pytest.raises(SGLangRefused, match="leave the temperature out"):
        refuse_raw_logprobs(rows(0.0))


def test_a_reply_of_another_program_is_named() -> None:
    with pytest.raises(SGLangRefused, match=r"http://x answered something .* model_path: Field required"):
        parse(ModelInfo, {"hello": 1}, "http://x")
