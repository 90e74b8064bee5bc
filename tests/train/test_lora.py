"""Adapters on a policy: what they train, what they start from, what they keep in memory and in checkpoints."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from irlfast.data import TokenizedDemonstration
from irlfast.rewards import RewardModel, RewardModelConfig
from irlfast.rewards.reader import weights_digest
from irlfast.rollout import SamplingParams, Sequences, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, checkpoint
from irlfast.train.config import CriticConfig, LoraConfig
from irlfast.train.lora import SharedReference, add_lora, is_lora
from irlfast.train.scoring import response_scores

pytest.importorskip("peft")
VOCAB, EOS, PAD = 64, 2, 0
LM = Callable[[str], nn.Module]


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)


def rows() -> list[TokenizedDemonstration]:
    return [
        TokenizedDemonstration(prompt_ids=(1, i, i + 1), response_ids=(3, 4, i, EOS), truncated=False)
        for i in range(5, 29)
    ]


def make(base: nn.Module, config: BiLevelConfig, out: Path | None = None, **options: Any) -> BiLevelTrainer:
    torch.manual_seed(3)
    return BiLevelTrainer(
        policy=base,
        engine=TransformersEngine(base, eos_token_id=EOS, pad_token_id=PAD),
        reward=RewardModel(RewardModelConfig(hidden_size=34, hidden_sizes=(8,))),
        demonstrations=rows()[:16],
        heldout=rows()[16:],
        config=config,
        pad_token_id=PAD,
        out=out,
        **options,
    )


@pytest.fixture
def config(small_config: BiLevelConfig) -> BiLevelConfig:
    return replace(
        small_config,
        prompts_per_step=4,
        eval_prompts=8,
        rollout=SamplingParams(max_new_tokens=6, n=4),
        policy=PolicyConfig(
            kind="ppo", epochs=2, lora=LoraConfig(rank=2), optimizer=OptimizerConfig(lr=0.02, warmup_steps=2)
        ),
    )


def batch() -> Sequences:
    return Sequences.from_token_lists([[1, 5, 6], [1, 9]], [[7, 8, EOS], [3, 4, 5, EOS]], PAD)


def storage(modules: Iterable[nn.Module]) -> int:
    """Floats held by the modules' parameters, shared ones once."""
    return sum({p.data_ptr(): p.numel() for module in modules for p in module.parameters()}.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapted_policy_starts_as_the_model_and_its_reference_stays_that_bit_for_bit(
    make_lm: LM, config: BiLevelConfig, family: str
) -> None:
    base = make_lm(family)
    before = response_scores(copy.deepcopy(base), batch(), hidden_states=True)
    trainer = make(base, config)
    start = response_scores(trainer.policy, batch())
    assert torch.equal(start.stats.logprob, before.stats.logprob)
    trainer.policy_step(trainer._gather())
    trainer.policy_step(trainer._gather())
    assert not torch.equal(response_scores(trainer.policy, batch()).stats.logprob, before.stats.logprob)
    reference = response_scores(trainer.reference, batch(), hidden_states=True)  # type: ignore[arg-type]
    for got, want in ((reference.stats.logprob, before.stats.logprob), (reference.hidden, before.hidden)):
        assert got is not None
        assert torch.equal(got, want)  # type: ignore[arg-type]
        assert not got.requires_grad
    moved = response_scores(trainer.policy, batch()).stats.logprob
    assert moved.requires_grad  # the adapters are on again
    assert trainer.evaluate()["kl"] != 0.0


def test_memory_holds_one_base(make_lm: LM, config: BiLevelConfig) -> None:
    base = make_lm("llama")
    size, told_by = storage([base]), weights_digest(base)
    trainer = make(base, config)
    assert isinstance(trainer.reference, SharedReference)
    assert list(trainer.reference.state_dict()) == []
    adapters = sum(p.numel() for name, p in trainer.policy.named_parameters() if "lora_" in name)
    engine: Any = trainer.engine
    assert storage([trainer.policy, trainer.reference, engine.model]) == size + adapters
    assert 0 < adapters < size / 2
    assert trainer.reward.source is not None
    assert trainer.reward.source.weights == told_by  # scoring later asks for the base by these
    trainable = {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_the_engine_samples_the_adapted_policy(make_lm: LM, config: BiLevelConfig) -> None:
    """It was made with the bare model, whose layers the adapters are put into."""
    trainer = make(make_lm("llama"), config)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    got = trainer._gather().samples
    now = response_scores(trainer.policy, got).stats.logprob
    torch.testing.assert_close(got.model_logprobs, now.detach(), rtol=0, atol=1e-4)
    was = response_scores(trainer.reference, got).stats.logprob  # type: ignore[arg-type]
    assert float((got.model_logprobs - was).abs().max()) > 0.1


def test_targets_and_rank_are_those_asked_for(make_lm: LM) -> None:
    policy = add_lora(make_lm("llama"), LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj")))
    adapters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".q_proj." in name or ".v_proj." in name for name in adapters)
    assert all(3 in p.shape for p in adapters.values())
    assert len(adapters) == 2 * 2 * 2  # layers, targets, A and B
    assert is_lora(policy)
    with pytest.raises(ValueError, match="for a policy with adapters already"):
        add_lora(policy, LoraConfig(rank=3))
    with pytest.raises(ValueError, match="reads = 'own' copies the policy"):
        PolicyConfig(kind="ppo", advantage="gae", critic=CriticConfig(reads="own"), lora=LoraConfig(rank=1))
    for bad in ({"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"lora.{next(iter(bad))} = "):
            LoraConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("critic", [False, True])
def test_a_run_with_adapters_resumes_to_the_same_bits(
    make_lm: LM, config: BiLevelConfig, tmp_path: Path, critic: bool
) -> None:
    if critic:
        config = replace(config, policy=replace(config.policy, advantage="gae"))
    whole = make(make_lm("llama"), config, tmp_path / "whole")
    expected = whole.train()
    stopped = make(make_lm("llama"), config, tmp_path / "run")
    iterate = stopped._iterate

    def stop_after_three() -> dict[str, float]:
        if stopped.iteration == 3:
            raise KeyboardInterrupt
        return iterate()

    stopped._iterate = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make(make_lm("llama"), config, tmp_path / "run")
    assert resumed.resume() == 2
    assert resumed.train() == expected
    state = whole.policy.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.policy.state_dict().items())
    saved = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-4" / "policy").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
    assert "model.safetensors" not in saved


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call of transformers
def test_saved_adapters_load_with_peft(make_lm: LM, config: BiLevelConfig, tmp_path: Path) -> None:
    import peft

    trainer = make(make_lm("llama"), config, tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoints" / "step-4" / "policy"
    loaded = peft.PeftModel.from_pretrained(make_lm("llama"), folder).eval()
    got, want = (response_scores(model, batch()).stats.logprob for model in (loaded, trainer.policy))
    assert torch.equal(got, want)


def test_adapters_of_another_shape_are_refused(make_lm: LM, config: BiLevelConfig, tmp_path: Path) -> None:
    make(make_lm("llama"), config, tmp_path).train()
    other = replace(config, policy=replace(config.policy, lora=LoraConfig(rank=3)))
    with pytest.raises(ValueError, match=r"policy\.lora\.rank was 2, is 3"):
        make(make_lm("llama"), other, tmp_path).resume()
