import json
import os

import pytest
import torch

from irlfast.rewards import ReaderConfig, RewardModel, RewardModelConfig, load_reward_model, storage

safetensors = pytest.importorskip("safetensors.torch")


def trained(**options) -> RewardModel:
    torch.manual_seed(0)
    model = RewardModel(RewardModelConfig(**{"hidden_size": 5, "pooling": ("last", "mean"), **options}))
    model.fit_feature_scale(torch.randn(8, 3, 5), torch.ones(8, 3, dtype=torch.bool))
    model.normalizer.update(torch.tensor([1 / 3, 5.0]))
    return model


def rewards(model: RewardModel) -> torch.Tensor:
    torch.manual_seed(1)
    return model.serve(torch.randn(7, 4, 5), torch.ones(7, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"hidden_sizes": (), "bias": False, "output_bound": 3.0, "pooling": "max"}])
def test_a_saved_model_comes_back_the_same(tmp_path, dtype, options):
    model = trained(**options).to(dtype)
    model.save_pretrained(tmp_path / "new" / "reward")
    back = RewardModel.from_pretrained(tmp_path / "new" / "reward")
    assert back.config == model.config
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert back.state_dict()[name].dtype == value.dtype
        assert torch.equal(back.state_dict()[name], value)
    assert torch.equal(rewards(back), rewards(model))
    assert sorted(os.listdir(tmp_path / "new" / "reward")) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_the_model_and_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    trained().save_pretrained(tmp_path)
    second = trained(hidden_sizes=(3,))
    second.save_pretrained(tmp_path)
    assert torch.equal(rewards(RewardModel.from_pretrained(tmp_path)), rewards(second))
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_a_save_that_fails_leaves_the_old_model_and_no_litter(tmp_path, monkeypatch):
    first = trained()
    first.save_pretrained(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        trained(hidden_sizes=(3,)).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(rewards(RewardModel.from_pretrained(tmp_path)), rewards(first))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_files_of_two_saves_are_told_apart(tmp_path):
    for name, sizes in (("a", (4,)), ("b", (4, 4))):
        trained(hidden_sizes=sizes).save_pretrained(tmp_path / name)
    os.replace(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="come from different saves"):
        RewardModel.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    trained().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        RewardModel.from_pretrained(tmp_path)


def test_a_model_of_format_1_is_still_read(tmp_path):
    """As irlfast 0.1.0 wrote it before there were other kinds: neither model_type nor source, in header and weights."""
    model = trained(output_bound=3.0)
    config = {
        "hidden_size": 5,
        "hidden_sizes": [128],
        "pooling": ["last", "mean"],
        "activation": "gelu",
        "dropout": 0.0,
        "layer_norm": False,
        "bias": True,
        "output_bound": 3.0,
    }
    header = json.dumps({"format": 1, "irlfast_version": "0.1.0", "config": config}, indent=2, sort_keys=True)
    (tmp_path / "config.json").write_text(header)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"irlfast": header})
    back = load_reward_model(tmp_path)
    assert type(back) is RewardModel
    assert back.source is None
    assert torch.equal(rewards(back), rewards(model))


def test_what_it_reads_is_saved_with_it(tmp_path):
    model = trained()
    model.source = ReaderConfig(model="owner/name", layer=3, token_statistics=False, weights="0123456789abcdef")
    model.save_pretrained(tmp_path)
    assert load_reward_model(tmp_path).source == model.source


def test_an_unknown_kind_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "model_type": "oracle"}))
    with pytest.raises(ValueError, match=r"config.json: 'oracle' is no kind of reward model"):
        load_reward_model(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    header.update(format=3, irlfast_version="9.1.0")
    (tmp_path / "config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"format 3, written by irlfast 9.1.0; .* reads up to 2: upgrade irlfast"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"model_type": "llama"}', "it is no reward model of irlfast"),
        ('{"format": 1, "config": {"hidden_sizes": [3]}}', "needs hidden_size"),
        ('{"format": 1, "config": {"hidden_size": 5, "depth": 3}}', r"unknown fields \['depth'\]"),
        ('{"format": 1, "config": {"hidden_size": 5, "pooling": "first"}}', "pooling 'first' is unknown"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path, content, message):
    trained().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"missing \['network.0.bias'\], unknown \[\]"),
        ("unknown", r"missing \[\], unknown \['extra'\]"),
        ("shape", r"network.0.bias in .* has shape \[3\], the configuration asks for \[128\]"),
        ("cut", "model.safetensors cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, fault, message):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(path)
    if fault == "missing":
        del tensors["network.0.bias"]
    elif fault == "unknown":
        tensors["extra"] = torch.zeros(1)
    elif fault == "shape":
        tensors["network.0.bias"] = torch.zeros(3)
    content = safetensors.save(tensors)
    path.write_bytes(content[:50] if fault == "cut" else content)
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(tmp_path)
