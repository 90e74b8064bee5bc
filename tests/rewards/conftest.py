from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from irlfast.rewards import BaseRewardModel, create_reward_model

HIDDEN = 6
HEAD = {"hidden_size": HIDDEN}
# Every kind of reward on hidden states, and both forms of what has two.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {**HEAD, "pooling": ("last", "mean", "max"), "hidden_sizes": (8,), "output_bound": 3.0}),
    "mlp last": ("mlp", {**HEAD, "layer_norm": True}),
    "linear mean": ("mlp", {**HEAD, "hidden_sizes": (), "pooling": "mean"}),
    "trajectory": ("trajectory", {**HEAD, "width": 16, "heads": 2}),
    "trajectory sum": ("trajectory", {**HEAD, "width": 16, "heads": 2, "reduction": "sum", "read_prompt": False}),
    "trajectory last": ("trajectory", {**HEAD, "width": 16, "heads": 2, "reduction": "last", "output_bound": 2.0}),
    "multi": (
        "multi",
        {
            "parts": [
                {"name": "linear", "options": {**HEAD, "hidden_sizes": (), "pooling": "mean"}, "weight": 2.0},
                {"name": "path", "model_type": "trajectory", "options": {**HEAD, "reduction": "sum"}, "weight": -0.5},
            ]
        },
    ),
    "ensemble": ("ensemble", {"options": {**HEAD, "pooling": "mean"}, "members": 3}),
}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_reward() -> Callable[[str], BaseRewardModel]:
    """A function from a name in KINDS to a new reward model, always the same, with statistics of its own."""

    def make(kind: str) -> BaseRewardModel:
        model_type, options = KINDS[kind]
        torch.manual_seed(3)
        reward = create_reward_model(options, model_type).eval()
        reward.fit_feature_scale(torch.randn(9, 4, HIDDEN) + 2, *[torch.ones(9, 4, dtype=torch.bool)] * 2)
        reward.normalizer.update(torch.tensor([1 / 3, 5.0]))
        return reward

    return make


@pytest.fixture
def trajectories() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [5, 9, H], response mask and context mask: ragged prompts and responses, one of a single token."""
    torch.manual_seed(1)
    hidden = torch.randn(5, 9, HIDDEN)
    prompts, ends = torch.tensor([[2], [1], [3], [4], [5]]), torch.tensor([[9], [6], [8], [5], [7]])
    steps = torch.arange(9)
    return hidden, (steps >= prompts) & (steps < ends), steps < ends


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    """61 words and three special tokens, <pad> apart from </s>."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(vocabulary)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
