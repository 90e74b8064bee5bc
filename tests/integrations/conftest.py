"""Helpers beside the tests of the integrations, and a policy of 16 words, random but able to learn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

WORDS, EOS, PAD = 13, 2, 0
TEMPLATE = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}w12 "


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    """w0 to w12 and three special tokens; its chats are the turns one behind the other."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(vocabulary)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="package")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama and its tokenizer, saved."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=3 + WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    folder = tmp_path_factory.mktemp("policy")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_policy(policy_folder: Path) -> Callable[[], Any]:
    transformers = pytest.importorskip("transformers")
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(policy_folder)
