from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy_rows() -> Callable[..., list[TokenizedDemonstration]]:
    """A function from a count and a seed to demonstrations of the toy language's expert, prompt BOS."""

    def rows(count: int, *, seed: int = 0) -> list[TokenizedDemonstration]:
        strings = toy.all_strings()
        drawn = toy.sample_strings(count, seed=seed).tolist()
        return [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=strings[i], truncated=False) for i in drawn]

    return rows


@pytest.fixture
def small_config() -> BiLevelConfig:
    """Few and small steps, KL to a reference, no clipping of gradients."""
    return BiLevelConfig(
        iterations=4,
        prompts_per_step=16,
        regularizer="kl",
        eval_every=2,
        eval_prompts=16,
        checkpoint_every=2,
        rollout=SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=12),
        policy=PolicyConfig(optimizer=OptimizerConfig(lr=0.05, max_grad_norm=0.0)),
        reward=RewardConfig(optimizer=OptimizerConfig(lr=0.05, max_grad_norm=0.0)),
    )


@pytest.fixture
def make_trainer(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> Callable[..., BiLevelTrainer]:
    """A function to a bi-level trainer on the toy language whose reference is a random policy and its start.

    The reward reads the reference's hidden states (the true features), its token statistics where the configuration
    says so, and is an MLP with dropout where `mlp` is set.
    """

    def make(
        config: BiLevelConfig,
        *,
        out: Path | None = None,
        mlp: bool = False,
        dtype: torch.dtype = torch.float32,
        demonstrations: list[TokenizedDemonstration] | None = None,
    ) -> BiLevelTrainer:
        torch.manual_seed(17)
        policy, reference = toy.ToyPolicy(dtype=dtype), toy.ToyPolicy(dtype=dtype)
        torch.nn.init.normal_(reference.table)
        policy.load_state_dict(reference.state_dict())
        hidden_size = toy.NUM_FEATURES + (2 if config.reward.token_statistics else 0)
        shape = RewardModelConfig(hidden_size=hidden_size, hidden_sizes=(), bias=False)
        if mlp:
            shape = replace(shape, hidden_sizes=(8,), dropout=0.2, pooling=("mean", "last"))
        rows = toy_rows(64 + config.eval_prompts)
        return BiLevelTrainer(
            policy=policy,
            engine=TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD),
            reward=RewardModel(shape),
            demonstrations=rows[:64] if demonstrations is None else demonstrations,
            heldout=rows[64:],
            config=config,
            pad_token_id=toy.PAD,
            out=out,
            reference=reference,
        )

    return make
