"""A head on a transformers backbone: what is trained, what is saved, what comes back; and its export."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.rewards import (
    BackboneRewardModel,
    ExportError,
    ReaderConfig,
    create_reward_model,
    export_sequence_classifier,
    load_reward_model,
    read,
    reward_inputs,
)

# peft asks transformers for an attribute by the name that it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def folder(make_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_lm("llama").save_pretrained(path)
    return path


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask, response_mask [4, 10], right-padded."""
    torch.manual_seed(0)
    steps = torch.arange(10)
    ends = torch.tensor([[10], [7], [9], [4]])
    ids = torch.randint(3, 64, (4, 10)).masked_fill(steps >= ends, 0)
    return ids, steps < ends, (steps >= 3) & (steps < ends)


def make(folder: Path, **options: Any) -> BackboneRewardModel:
    torch.manual_seed(1)
    reward = create_reward_model({"model": str(folder), **options}, "backbone")
    assert isinstance(reward, BackboneRewardModel)
    return reward


def train(reward: BackboneRewardModel, batch: Any, steps: int = 3) -> set[str]:
    """Names of the parameters that a few steps changed."""
    before = {name: p.detach().clone() for name, p in reward.named_parameters()}
    reward.train()
    optimiser = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        (reward(*batch) * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
        optimiser.step()
    reward.eval()
    return {name for name, p in reward.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_the_head_of_a_backbone_really_comes_back(folder: Path, batch: Any, tuning: str, tmp_path: Path) -> None:
    """Regression: an earlier system saved backbone or adapters without the head, and served a new, untrained one."""
    reward = make(folder, tuning=tuning, pooling=("last", "mean"))
    reward.fit_feature_scale(*batch)
    changed = train(reward, batch)
    assert any(name.startswith("network.") for name in changed)
    in_backbone = [name for name in changed if name.startswith("backbone.")]
    assert bool(in_backbone) == (tuning != "frozen")
    assert all("lora_" in name for name in in_backbone) or tuning == "full"
    reward.serve(*batch, update=True)
    reward.save_pretrained(tmp_path)
    back = load_reward_model(tmp_path)
    for name, value in reward.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert torch.equal(back.serve(*batch), reward.serve(*batch))
    untrained = make(folder, tuning=tuning, pooling=("last", "mean")).eval()
    assert not torch.allclose(untrained(*batch), reward(*batch))


def test_what_is_saved_is_what_was_trained(folder: Path) -> None:
    def backbone_part(tuning: str) -> set[str]:
        return {name for name in make(folder, tuning=tuning).saved_state() if name.startswith("backbone.")}

    assert backbone_part("frozen") == set()
    assert all("lora_" in name for name in backbone_part("lora"))
    assert len(backbone_part("lora")) > 0
    assert len(backbone_part("full")) == len(list(transformers.AutoModel.from_pretrained(folder).parameters()))


def test_a_backbone_that_moved_is_found_and_another_is_refused(
    make_lm: Any, folder: Path, batch: Any, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "here")
    reward = make(tmp_path / "here", tuning="lora").eval()
    reward.save_pretrained(tmp_path / "reward")
    (tmp_path / "here").rename(tmp_path / "there")
    back = load_reward_model(tmp_path / "reward", backbone=str(tmp_path / "there"))
    assert torch.equal(back(*batch), reward(*batch))
    other = make_lm("llama")
    torch.nn.init.normal_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "here")
    with pytest.raises(ValueError, match=r"the backbone at .*here has weights .*, the reward in .* was trained on"):
        load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_padding_changes_nothing_and_token_rewards_add_up(folder: Path, batch: Any, tuning: str) -> None:
    reward = make(folder, tuning=tuning).eval()
    rewards = reward(*batch).detach()
    ids, real, mask = batch
    wider = [torch.nn.functional.pad(part, (0, 20)) for part in batch]
    torch.testing.assert_close(reward(*wider).detach(), rewards, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(ids.masked_fill(~real, 9), real, mask).detach(), rewards, rtol=0, atol=1e-5)
    tokens = reward.token_rewards(*batch)
    assert tokens.kind == "attribution"
    torch.testing.assert_close(tokens.total(mask), rewards, rtol=0, atol=1e-5)


def test_a_frozen_backbone_stays_in_evaluation_mode(make_lm: Any, tmp_path: Path, batch: Any) -> None:
    make_lm("gpt2").save_pretrained(tmp_path)  # has dropout
    reward = make(tmp_path)
    reward.train()
    assert reward.network.training
    assert not reward.backbone.training
    assert torch.equal(reward(*batch), reward(*batch))


def test_configuration_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="tuning 'qlora' is unknown"):
        make(folder, tuning="qlora")
    with pytest.raises(ValueError, match="lora_rank must be positive integers, got 0"):
        make(folder, lora_rank=0)
    with pytest.raises(ValueError, match="'backbone' needs model"):
        create_reward_model({}, "backbone")


# What a reward on hidden states reads


def test_reader_gives_the_layer_and_the_statistics_that_were_asked_for(make_lm: Any, batch: Any) -> None:
    model, (ids, real, mask) = make_lm("llama"), batch
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
        reading = read(model, ids, real, mask, ReaderConfig(layer=1))
    assert reading.hidden_states.shape == (4, 10, 34)
    torch.testing.assert_close(reading.hidden_states[..., :32], output.hidden_states[1])
    logprobs = output.logits[:, :-1].log_softmax(-1)
    want = logprobs.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask[:, 1:], 0.0)
    torch.testing.assert_close(reading.hidden_states[:, 1:, 32], want, rtol=0, atol=1e-5)
    entropy = -(logprobs.exp() * logprobs).sum(-1).masked_fill(~mask[:, 1:], 0.0)
    torch.testing.assert_close(reading.hidden_states[:, 1:, 33], entropy, rtol=0, atol=1e-5)
    assert read(model, ids, real, mask, ReaderConfig(token_statistics=False)).hidden_states.shape[2] == 32
    with pytest.raises(IndexError, match=r"layer 3 is outside \[-3, 3\): 3 hidden states"):
        read(model, ids, real, mask, ReaderConfig(layer=3))


def test_inputs_for_either_kind_of_reward(make_lm: Any, folder: Path, batch: Any) -> None:
    backbone = make(folder)
    assert all(a is b for a, b in zip(reward_inputs(backbone, None, *batch), batch, strict=True))
    reward = create_reward_model({"hidden_size": 32})
    with pytest.raises(ValueError, match="a RewardModel reads hidden states: give the language model"):
        reward_inputs(reward, make_lm("llama"), *batch)
    reward.source = ReaderConfig(token_statistics=False)
    with pytest.raises(ValueError, match="a RewardModel reads hidden states: give the language model"):
        reward_inputs(reward, None, *batch)
    assert reward(*reward_inputs(reward, make_lm("llama"), *batch)).shape == (4,)


# Export


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_an_exported_reward_scores_as_the_reward(
    make_lm: Any, tokenizer: Any, batch: Any, family: str, kind: str, tmp_path: Path
) -> None:
    """Reloaded by transformers alone: logits[:, 0] is the served reward less the offset, whatever the padding."""
    model = make_lm(family)
    model.save_pretrained(tmp_path / "lm")
    linear = {"hidden_sizes": (), "pooling": "last"}
    torch.manual_seed(2)
    if kind == "mlp":
        reward = create_reward_model({"hidden_size": 32, **linear})
        reward.source = ReaderConfig(token_statistics=False)
        with torch.no_grad():
            inputs = reward_inputs(reward, model, *batch)
    else:
        reward = make(tmp_path / "lm", tuning="lora", **linear)
        train(reward, batch)
        inputs = batch
    reward.fit_feature_scale(*inputs)
    reward.normalizer.update(torch.tensor([-3.0, 5.0, 11.0]))
    want = reward.serve(*inputs)
    assert float(want.std()) > 0.01
    offset = export_sequence_classifier(reward, tmp_path / "out", tokenizer, None if kind == "lora" else model)

    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id != tokenizer.eos_token_id
    assert loaded.config.irlfast_offset == offset
    ids, real, _ = batch
    for extra in (0, 6):
        wide = [torch.nn.functional.pad(part, (0, extra)) for part in (ids, real)]
        with torch.no_grad():
            logits = loaded(input_ids=wide[0], attention_mask=wide[1].long()).logits
        assert logits.shape == (4, 1)
        torch.testing.assert_close(logits[:, 0] + offset, want, rtol=0, atol=1e-5)
    # As TRL calls a reward model: texts through the saved tokenizer, padded, logits[:, 0].
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [saved.decode(row[mask]) for row, mask in zip(ids, real, strict=True)]
    encoded = saved(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        logits = loaded(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(logits + offset, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "statistics", "message"),
    [
        ({"hidden_sizes": (4,)}, False, r"hidden_sizes = \(4,\), expected \(\)"),
        ({"pooling": "mean"}, False, "pooling = 'mean', expected 'last'"),
        ({"output_bound": 3.0}, False, r"output_bound = 3\.0, expected None"),
        ({"layer_norm": True}, False, "layer_norm = True"),
        ({}, True, "it reads token statistics beside the states"),
    ],
)
def test_a_reward_that_does_not_fit_is_refused_with_the_alternative(
    make_lm: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any], statistics: bool, message: str
) -> None:
    width = 34 if statistics else 32
    reward = create_reward_model({"hidden_size": width, "hidden_sizes": (), **options})
    reward.source = ReaderConfig(token_statistics=statistics)
    with pytest.raises(ExportError, match=message + r".*Use it as a function instead: irlfast\.scorer\.RewardScorer"):
        export_sequence_classifier(reward, tmp_path, tokenizer, make_lm("llama"))
    assert not list(tmp_path.iterdir())


def test_other_kinds_and_bare_tokenizers_are_refused(make_lm: Any, tokenizer: Any, tmp_path: Path) -> None:
    trajectory = create_reward_model({"hidden_size": 32}, "trajectory")
    with pytest.raises(ExportError, match="a TrajectoryRewardModel is not a linear map of one token's state"):
        export_sequence_classifier(trajectory, tmp_path, tokenizer, make_lm("llama"))
    reward = create_reward_model({"hidden_size": 32, "hidden_sizes": ()})
    reward.source = ReaderConfig(token_statistics=False)
    with pytest.raises(ValueError, match="give language_model="):
        export_sequence_classifier(reward, tmp_path, tokenizer)
    with_eos = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>"
    )
    with pytest.raises(ValueError, match="the tokenizer pads with '</s>', its EOS is '</s>'"):
        export_sequence_classifier(reward, tmp_path, with_eos, make_lm("llama"))
