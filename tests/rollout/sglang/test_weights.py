"""What is sent of a policy, without a server: names, shapes, adapters merged, shards gathered."""

from __future__ import annotations

import base64
import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_ranks import update
from stand_in import StandIn

from irlfast.rollout.sglang.weights import ExpectedWeights, buckets, folder_shapes, policy_tensors


@pytest.fixture
def tiny_config() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture
def tiny(tiny_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_a_whole_policy_is_what_is_expected_and_tied_weights_come_once(tiny: Any, tiny_config: Any) -> None:
    tensors = dict(policy_tensors(tiny))
    assert ("lm_head.weight" in tensors) + ("model.embed_tokens.weight" in tensors) == 1
    ExpectedWeights(tiny_config).check(shapes_of(tensors))
    own = tiny.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in tensors.items())
    with torch.no_grad():
        own["model.norm.weight"] += 1
    assert not torch.equal(tensors["model.norm.weight"], own["model.norm.weight"])  # copies


def test_what_does_not_fit_is_named(tiny: Any, tiny_config: Any) -> None:
    expected, shapes = ExpectedWeights(tiny_config), shapes_of(dict(policy_tensors(tiny)))
    expected.check({**shapes, "lm_head.weight": (32, 16), "model.embed_tokens.weight": (32, 16)})  # both of the tied
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[15\], the served model \[16\]"):
        expected.check({**shapes, "model.norm.weight": (15,)})
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['x'\]"):
        expected.check({**shapes, "x": (1,)})
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        expected.check({name: shape for name, shape in shapes.items() if name != "model.norm.weight"})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_adapters_are_merged_as_peft_merges_them_and_left_as_they_are(tiny: Any, tiny_config: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    tensors = dict(policy_tensors(adapted))
    ExpectedWeights(tiny_config).check(shapes_of(tensors))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    merged = copy.deepcopy(adapted).merge_and_unload().state_dict()
    for name, value in tensors.items():
        torch.testing.assert_close(value, merged[name], rtol=0.0, atol=1e-6)
    # The base model that was adapted in place says the same as its wrapper.
    inner = dict(policy_tensors(adapted.get_base_model()))
    assert inner.keys() == tensors.keys()
    assert all(torch.equal(inner[name], tensors[name]) for name in inner)
    with adapted.disable_adapter():
        pass
    adapted.merge_adapter()
    for name, value in policy_tensors(adapted):
        torch.testing.assert_close(value, merged[name], rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_that_cannot_be_merged_is_refused(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"q_proj \(Linear\) is no plain LoRA"):
        list(policy_tensors(peft.get_peft_model(copy.deepcopy(tiny), config)))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"modules_to_save .*norm"):
        list(policy_tensors(peft.get_peft_model(copy.deepcopy(tiny), config)))


def test_a_policy_with_nan_is_not_sent(tiny: Any) -> None:
    with torch.no_grad():
        tiny.model.norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"model.norm.weight of the policy is not finite: training has diverged"):
        list(policy_tensors(tiny))


def test_shapes_are_read_from_the_headers_of_a_folder(tiny: Any, tiny_config: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shapes = folder_shapes(tmp_path)
    ExpectedWeights(tiny_config).check(shapes)
    assert shapes["model.norm.weight"] == (16,)


def test_buckets_hold_every_tensor_once_and_no_more_than_their_size() -> None:
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate([10, 10, 300, 5, 5])}
    runs = list(buckets(tensors, size=100))
    assert [[name for name, _ in run] for run in runs] == [["t0", "t1"], ["t2"], ["t3", "t4"]]


def test_a_policy_sharded_over_two_ranks_is_gathered_and_sent_once(tmp_path: Path, stand_in: StandIn) -> None:
    """Both ranks update an engine; each held a part of every tensor, the first sends all, and both know the version."""

    def score(body: dict[str, Any]) -> tuple[int, Any]:
        logprobs = [[None if i == 0 else -1.0, token, None] for i, token in enumerate(body["input_ids"])]
        meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": logprobs}
        return 200, {"output_ids": [], "meta_info": meta}

    stand_in.answers["/generate"] = score
    stand_in.answers["/update_weights_from_tensor"] = (200, {"success": True})
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=update, args=(rank, str(tmp_path), stand_in.url)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = ((tmp_path / f"rank{number}").read_text().split() for number in (0, 1))
    assert first == second
    assert int(first[0]) == 20  # sharded tensors
    sent = [body for path, body in stand_in.asked if path == "/update_weights_from_tensor"]
    assert [body["weight_version"] for body in sent] == [first[1]]
    tensors = dict(pickle.loads(base64.b64decode(sent[0]["serialized_named_tensors"][0])))  # our own
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert tensors.keys() == whole.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, whole[name]) for name, value in tensors.items())
