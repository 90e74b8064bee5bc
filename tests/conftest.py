import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# torch's compiler imports setuptools, which warns where some test has imported distutils before.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

VOCAB, EOS, PAD, CONTEXT = 64, 2, 0, 64

# With `pytest -n 2` the tests of a file run in one process, and so do all tests of these folders: what they share is a
# server, or a build.
TOGETHER = ("tests/packaging", "tests/rollout/sglang")
# These take longest and begin first, so that neither process ends long before the other.
FIRST = ("tests/rollout/sglang", "tests/cuda/test_emulation.py", "tests/native", "tests/packaging")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes: each, and what it starts, has one core
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((i for i, part in enumerate(FIRST) if item.nodeid.startswith(part)), len(FIRST))
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist, which need not be installed where `-n` is not asked for."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)

    config.option.loadscopereorder = False
    return Scheduler(config, log)


def _config(transformers: ModuleType, family: str) -> Any:
    small = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    if family == "gpt2":  # learned absolute positions, dropout
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **small)
    if family == "llama":
        return transformers.LlamaConfig(**llama, **small)
    if family == "mistral":  # a window shorter than the sequences, so its cache drops old columns
        return transformers.MistralConfig(sliding_window=6, **llama, **small)
    if family == "qwen3":  # grouped heads, normed queries and keys
        return transformers.Qwen3Config(head_dim=8, **llama, **small)
    if family == "phi":  # a bias in the output layer
        return transformers.PhiConfig(**llama, **small)
    if family == "cohere":  # logits are multiplied after the output layer, whose weight is the embedding's
        return transformers.CohereConfig(logit_scale=0.25, **llama, **small)
    if family == "granite":  # logits are divided
        return transformers.GraniteConfig(logits_scaling=4.0, **llama, **small)
    if family == "hyperclovax":  # logits are multiplied by what Granite divides by
        return transformers.HyperCLOVAXConfig(logits_scaling=0.5, **llama, **small)
    if family == "gpt_neox":
        del llama["num_key_value_heads"]
        return transformers.GPTNeoXConfig(**llama, **small)
    if family == "mpt":  # takes no position_ids; has a logit_scale that it does not apply
        return transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT, logit_scale=0.5, **small)
    if family == "gemma2":  # logits are capped after the output layer
        return transformers.Gemma2Config(head_dim=8, sliding_window=6, **llama, **small)
    if family == "bloom":  # takes no position_ids
        return transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **small)
    if family == "opt":  # positions are counted from the attention mask; calls the decoder in its base model
        return transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=CONTEXT,
            **small,
        )
    raise ValueError(family)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and models beside the project; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def make_lm() -> Callable[[str], torch.nn.Module]:
    """A function from a family's name to a new tiny random model, always the same, with a peaked distribution."""

    transformers = pytest.importorskip("transformers")

    def make(family: str) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(_config(transformers, family))
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make
