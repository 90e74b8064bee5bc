"""BiLevelTrainer: what each step computes, how many there are, and what must not influence them.

Most of it runs on the toy language, where the gradient that a step estimates can be computed exactly.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.rollout import Rollouts, SamplingParams, TransformersEngine
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig
from irlfast.train.bilevel import Experience
from irlfast.train.config import EarlyStopConfig
from irlfast.train.mismatch import EDGES
from irlfast.train.policy_update import Targets

Make = Callable[..., BiLevelTrainer]


def gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.flatten().double() @ b.flatten().double() / (a.double().norm() * b.double().norm()))


def set_normalizer(trainer: BiLevelTrainer, *, mean: float, std: float) -> None:
    """As if so many rewards had been served that one batch more hardly moves it."""
    normalizer = trainer.reward.normalizer
    normalizer.count.fill_(1e12)
    normalizer.mean.fill_(mean)
    normalizer.m2.fill_(1e12 * std**2)


def exact_rewards(trainer: BiLevelTrainer) -> Tensor:
    """Raw learned reward of the 121 strings (a linear reward on the true features)."""
    weights = trainer.reward.network[0].weight.detach().double()[0]
    return toy.features() @ weights[: toy.NUM_FEATURES]


# How many steps, on what


@pytest.mark.parametrize(
    ("policy_steps", "reward_steps", "warmup", "expected"),
    [
        (1, 1, 0, "PRPRPR"),
        (2, 3, 0, "PPRRRPPRRRPPRRR"),
        (3, 1, 2, "RRPPPRPPPRPPPR"),
        (1, 0, 0, "PPP"),
        (0, 2, 0, "RRRRRR"),
    ],
)
def test_steps_are_taken_in_exactly_the_configured_ratio(
    make_trainer: Make, small_config: BiLevelConfig, policy_steps: int, reward_steps: int, warmup: int, expected: str
) -> None:
    config = replace(
        small_config,
        iterations=3,
        policy_steps=policy_steps,
        reward_steps=reward_steps,
        reward_warmup_steps=warmup,
        prompts_per_step=4,
    )
    trainer = make_trainer(config)
    taken: list[str] = []
    policy_step, reward_step = trainer.policy_step, trainer.reward_step
    trainer.policy_step = lambda e: (taken.append("P"), policy_step(e))[1]  # type: ignore[method-assign]
    trainer.reward_step = lambda e: (taken.append("R"), reward_step(e))[1]  # type: ignore[method-assign]
    trainer.train()
    assert "".join(taken) == expected
    assert trainer.policy_optimizer.step_count == expected.count("P") == trainer.policy_optimizer.total_steps
    assert trainer.reward_optimizer.step_count == expected.count("R") == trainer.reward_optimizer.total_steps


def test_each_step_draws_demonstrations_and_rollouts_afresh(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """64 demonstrations at 16 a step: four iterations see each once; policy steps sample anew, reward steps share."""
    rows = [
        TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=toy.all_strings()[i], truncated=False)
        for i in range(64)
    ]
    trainer = make_trainer(replace(small_config, reward_steps=1, eval_every=100), demonstrations=rows)
    gathered: list[Experience] = []
    rewarded: list[Experience] = []
    gather, reward_step = trainer._gather, trainer.reward_step
    trainer._gather = lambda: gathered.append(gather()) or gathered[-1]  # type: ignore[func-returns-value, method-assign]
    trainer.reward_step = lambda e: (rewarded.append(e), reward_step(e))[1]  # type: ignore[method-assign]
    trainer.train()
    seen = [tuple(ids.tolist()) for e in gathered for ids in toy.string_indices(e.experts.input_ids)[:, None]]
    assert sorted(seen) == [(i,) for i in range(64)]
    assert len(gathered) == trainer.rollout_count == 4
    assert [id(e) for e in rewarded] == [id(e) for e in gathered]
    assert all(len(e.samples) == 12 for e in gathered)
    samples = [e.samples.input_ids.tolist() for e in gathered]
    assert all(samples[i] != samples[j] for i in range(4) for j in range(i))


def test_reward_steps_beyond_the_policy_steps_sample_the_policy_again(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    trainer = make_trainer(replace(small_config, iterations=1, policy_steps=2, reward_steps=5))
    used: list[int] = []
    reward_step = trainer.reward_step
    trainer.reward_step = lambda e: (used.append(id(e.samples.input_ids)), reward_step(e))[1]  # type: ignore[method-assign]
    trainer.train()
    assert len(set(used)) == 5
    assert trainer.rollout_count == 5


# When it stops


def scripted_auc(trainer: BiLevelTrainer, values: list[float]) -> None:
    """Let evaluations after the first find these AUCs, in turn."""
    evaluate, script = trainer.evaluate, iter([0.5, *values])
    trainer.evaluate = lambda *given: {**evaluate(*given), "reward_auc": next(script)}  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("aucs", "options", "ends_at"),
    [
        ([0.7, 0.51, 0.49, 0.5], {"patience": 2, "band": 0.02}, 3),  # the reward that knows nothing yet does not count
        ([0.51, 0.7, 0.49, 0.53], {"patience": 2, "band": 0.02}, 4),  # not in a row
        ([0.5, 0.5, 0.5, 0.5], {"patience": 0}, 4),
        ([0.5, 0.5, 0.5, 0.5], {"patience": 1, "after": 3}, 3),
        ([0.45, 0.5, 0.5, 0.5], {"patience": 1, "band": 0.06}, 1),
        ([0.3, 0.3, 0.3, 0.3], {"patience": 1}, 4),  # far from .5 on the wrong side is not near it
    ],
)
def test_training_stops_where_heldout_auc_stays_near_one_half(
    make_trainer: Make,
    small_config: BiLevelConfig,
    tmp_path: Path,
    aucs: list[float],
    options: dict[str, Any],
    ends_at: int,
) -> None:
    config = replace(small_config, eval_every=1, checkpoint_every=100, early_stop=EarlyStopConfig(**options))
    trainer = make_trainer(config, out=tmp_path)
    scripted_auc(trainer, aucs)
    last = trainer.train()
    assert trainer.iteration == trainer.policy_optimizer.step_count == ends_at
    assert last["reward_auc"] == aucs[ends_at - 1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stops = [row["iteration"] for row in rows if row["kind"] == "stop"]
    assert stops == ([ends_at] if trainer.stopped_early else [])
    assert trainer.stopped_early == (ends_at < 4)
    resumed = make_trainer(config, out=tmp_path)
    assert resumed.resume() == ends_at
    assert resumed.stopped_early == trainer.stopped_early
    resumed.train()
    assert resumed.iteration == ends_at
    patient = make_trainer(replace(config, early_stop=replace(config.early_stop, patience=0)), out=tmp_path)
    patient.resume()
    patient.train()
    assert patient.iteration == 4


def test_early_stop_options_are_checked() -> None:
    for options in ({"patience": -1}, {"band": 0.0}, {"band": 0.5}, {"after": 0}):
        with pytest.raises(ValueError, match=f"early_stop.{next(iter(options))} = "):
            EarlyStopConfig(**options)  # type: ignore[arg-type]


def test_equal_prompts_form_one_group(make_trainer: Make, small_config: BiLevelConfig) -> None:
    prompts = [(toy.BOS,), (toy.BOS, 0), (toy.BOS,), (toy.BOS, 2)]
    rows = [TokenizedDemonstration(prompt_ids=p, response_ids=(1, toy.EOS), truncated=False) for p in prompts]
    rollout = SamplingParams(max_new_tokens=4, n=3)
    trainer = make_trainer(replace(small_config, prompts_per_step=4, rollout=rollout), demonstrations=rows)
    got = trainer._gather()
    assert len(got.samples) == 3 * 3
    prompt_of_group = {
        int(group): tuple(ids[: int(length)].tolist())
        for group, ids, length in zip(
            got.samples.groups, got.samples.input_ids, got.samples.prompt_lengths, strict=True
        )
    }
    assert sorted(prompt_of_group.values()) == sorted(set(prompts))
    for group, ids, length in zip(got.experts.groups, got.experts.input_ids, got.experts.prompt_lengths, strict=True):
        assert prompt_of_group[int(group)] == tuple(ids[: int(length)].tolist())


POLICY_KEYS = {
    *("loss", "policy", "entropy", "grad_norm", "lr", "return", "reward_served", "sampler_logprob", "length"),
    *("rollout_gap", "rollout_gap_max", "rollout_kl", "tokens", "sequences", "gap_mean", "gap_max"),
    *("lag_mean", "lag_max", *(f"gap_above_{edge:g}" for edge in EDGES)),
}
REWARD_KEYS = {
    *("loss", "expert_reward", "sample_reward", "margin", "auc", "log_normalizer", "ess", "ess_relative"),
    *("max_abs_reward", "grad_norm", "lr"),
}
PPO_KEYS = {
    *("clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl"),
    *("ratio_mean", "ratio_min", "ratio_max", "ess"),
}


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
@pytest.mark.parametrize("regularizer", ["kl", "entropy"])
def test_every_metric_is_logged_in_every_iteration(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path, kind: str, regularizer: str
) -> None:
    config = replace(
        small_config,
        regularizer=regularizer,
        reward_warmup_steps=3,
        eval_every=3,
        policy=replace(small_config.policy, kind=kind),
    )
    last = make_trainer(config, out=tmp_path).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["iteration"]) for row in rows] == [
        *(("warmup", 0), ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("eval", 4))
    ]
    policy = POLICY_KEYS | {"kl" if regularizer == "kl" else "log_prob"} | (PPO_KEYS if kind == "ppo" else set())
    common = {"kind", "iteration", "seconds"}
    for row in rows:
        assert None not in row.values()
        if row["kind"] == "train":
            reward = REWARD_KEYS | {"advantage_drift"}
            assert set(row) - common == {f"policy/{k}" for k in policy} | {f"reward/{k}" for k in reward}
        elif row["kind"] == "warmup":
            assert set(row) - common == {f"reward/{k}" for k in REWARD_KEYS}
    assert {k: v for k, v in rows[-1].items() if k not in common} == last
    assert {"kl", "reward_auc", "expert_token_logprob", "entropy", "repetition", "length"} <= set(last)


# What a step computes


@pytest.mark.parametrize("regularizer", ["kl", "entropy"])
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_policy_step_ascends_the_exact_objective(
    make_trainer: Make, small_config: BiLevelConfig, regularizer: str, kind: str
) -> None:
    """E[r] - beta KL(pi || b), or E[r] + beta H: with 20,000 samples the estimate points along the exact gradient."""
    config = replace(
        small_config,
        regularizer=regularizer,
        beta=0.7,
        rollout=replace(small_config.rollout, n=20_000),
        policy=PolicyConfig(kind=kind, micro_batch_size=20_000, optimizer=OptimizerConfig(max_grad_norm=0.0)),
        reward=RewardConfig(token_statistics=False),
    )
    trainer = make_trainer(config)
    with torch.no_grad():
        trainer.policy.table += torch.randn(trainer.policy.table.shape)
    rewards = exact_rewards(trainer)
    log_base = toy.log_probs(trainer.reference).detach() if regularizer == "kl" else torch.zeros(121)
    log_pi = toy.log_probs(trainer.policy)
    objective = (log_pi.exp() * (rewards - config.beta * (log_pi - log_base))).sum()
    (exact,) = torch.autograd.grad(objective, trainer.policy.table)
    gathered = trainer._gather()
    metrics = trainer.policy_step(gathered)
    scale = trainer.reward.normalizer.scale
    estimate = -gradient(trainer.policy) * scale
    assert cosine(estimate, exact) > 0.995
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1.0, abs=0.05)
    name = "kl" if regularizer == "kl" else "log_prob"
    assert metrics[name] == pytest.approx(float((log_pi.exp() * (log_pi - log_base)).sum().detach()), abs=0.05)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("regularizer", ["kl", "entropy"])
def test_reward_step_descends_the_exact_likelihood(
    make_trainer: Make, small_config: BiLevelConfig, regularizer: str, temperature: float
) -> None:
    """Mean features of p ~ b exp(r / beta) less those of the demonstrations, whatever temperature drew the samples."""
    config = replace(
        small_config,
        regularizer=regularizer,
        beta=0.7,
        prompts_per_step=64,
        rollout=replace(small_config.rollout, n=20_000, temperature=temperature),
        reward=RewardConfig(token_statistics=False, optimizer=OptimizerConfig(max_grad_norm=0.0)),
    )
    trainer = make_trainer(config)
    with torch.no_grad():
        trainer.policy.table.mul_(0.5)  # neither the base nor the target
    log_base = toy.log_probs(trainer.reference).detach().double() if regularizer == "kl" else torch.zeros(121)
    target = torch.softmax(exact_rewards(trainer) / config.beta + log_base, dim=0)
    gathered = trainer._gather()
    experts = toy.features()[toy.string_indices(gathered.experts.input_ids)].mean(0)
    exact = (target @ toy.features() - experts) / config.beta
    trainer.reward_step(gathered)
    estimate = gradient(trainer.reward)
    assert float((estimate - exact).norm() / exact.norm()) < 0.05
    assert float(exact.norm()) > 0.3


def test_micro_batches_add_up_to_the_same_policy_step(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """12 samples as one batch, as parts that divide them and parts that do not, in float64."""

    def step(size: int) -> tuple[Tensor, Tensor, float]:
        config = replace(small_config, policy=replace(small_config.policy, micro_batch_size=size))
        trainer = make_trainer(config, dtype=torch.float64)
        loss = trainer.policy_step(trainer._gather())["loss"]
        return gradient(trainer.policy), trainer.policy.table.detach(), loss

    whole = step(256)
    assert float(whole[0].norm()) > 0.01
    for size in (12, 6, 5, 1):
        got = step(size)
        torch.testing.assert_close(got[0], whole[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got[1], whole[1], rtol=1e-9, atol=1e-12)
        assert got[2] == pytest.approx(whole[2], rel=1e-12)  # the loss that is logged, too


def test_micro_batches_of_the_reference_change_nothing(make_trainer: Make, small_config: BiLevelConfig) -> None:
    def score(size: int) -> tuple[Tensor, Tensor]:
        trainer = make_trainer(replace(small_config, reward=replace(small_config.reward, micro_batch_size=size)))
        scored = trainer._gather().scored
        return scored.inputs[0], scored.log_base

    whole = score(256)
    assert whole[0].shape[2] == toy.NUM_FEATURES + 2
    for size in (5, 1):
        for got, want in zip(score(size), whole, strict=True):
            assert torch.equal(got, want)


def test_reward_reads_hidden_states_and_token_statistics_of_the_reference(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    trainer = make_trainer(small_config)
    gathered = trainer._gather()
    with torch.no_grad():
        trainer.policy.table.zero_()  # the policy moves on; what the reward reads must not
    ids, mask = gathered.samples.input_ids, gathered.samples.attention_mask
    features = trainer._score(gathered.samples).inputs[0]
    assert torch.equal(features, gathered.scored.inputs[0])
    assert torch.equal(features[..., : toy.NUM_FEATURES], toy.ToyFeatures()(ids, mask))
    logits = trainer.reference(ids, mask).logits  # type: ignore[misc]
    logprob = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    logprob = torch.where(gathered.samples.response_mask[:, 1:], logprob, 0.0)
    torch.testing.assert_close(features[:, 1:, -2], logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(gathered.scored.log_base, logprob.sum(1), rtol=0, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=trainer.reference.table[0]).entropy()  # type: ignore[union-attr]
    torch.testing.assert_close(features[:, 1, -1], entropy.expand(len(ids)), rtol=0, atol=1e-5)


# What must not matter


def test_kl_is_zero_at_the_start(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    assert trainer.evaluate()["kl"] == 0.0
    metrics = trainer.policy_step(trainer._gather())
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(trainer.evaluate()["kl"]) > 1e-4


def test_the_reward_loss_neither_reads_nor_writes_the_normalizer(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    def step(mean: float, std: float) -> tuple[dict[str, float], dict[str, Tensor], tuple[float, ...]]:
        trainer = make_trainer(small_config)
        set_normalizer(trainer, mean=mean, std=std)
        metrics = trainer.reward_step(trainer._gather())
        normalizer = trainer.reward.normalizer
        state = (float(normalizer.count), float(normalizer.mean), float(normalizer.std))
        return metrics, dict(trainer.reward.network.state_dict()), state

    first, second = step(0.0, 1.0), step(-5.0, 30.0)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert first[2] == (1e12, 0.0, 1.0)
    assert second[2] == (1e12, -5.0, 30.0)


def test_the_normalizer_scales_the_policy_gradient_and_does_not_turn_it(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    """beta is divided by the same scale as the reward, so the balance of reward and KL, the optimum, stays."""

    def step(mean: float, std: float) -> tuple[Tensor, dict[str, float]]:
        trainer = make_trainer(replace(small_config, beta=0.5))
        with torch.no_grad():
            trainer.policy.table += torch.linspace(-2, 2, 4)  # a KL that weighs
        set_normalizer(trainer, mean=mean, std=std)
        metrics = trainer.policy_step(trainer._gather())
        return gradient(trainer.policy), metrics

    (plain, of_plain), (scaled, of_scaled) = step(0.0, 1.0), step(-5.0, 30.0)
    torch.testing.assert_close(scaled * 30.0, plain, rtol=1e-4, atol=1e-5)
    assert cosine(scaled, plain) == pytest.approx(1.0, abs=1e-6)
    assert of_scaled["reward_served"] == pytest.approx((of_plain["reward_served"] + 5.0) / 30.0, abs=1e-4)
    assert abs(of_plain["kl"]) > 0.5


def test_serving_takes_the_rewards_into_the_statistics(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    gathered = trainer._gather()
    rewards = trainer.rewards(gathered.samples)
    metrics = trainer.policy_step(gathered)
    assert float(trainer.reward.normalizer.count) == 12.0
    assert float(trainer.reward.normalizer.mean) == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert metrics["reward_served"] == pytest.approx(0.0, abs=1e-6)  # the first batch is centred on itself


def test_the_reference_is_never_trained(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    assert trainer.reference is not None
    before = trainer.reference.table.detach().clone()  # type: ignore[union-attr]
    trainer.train()
    assert torch.equal(trainer.reference.table, before)  # type: ignore[arg-type]
    assert trainer.reference.table.grad is None  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    assert not trainer.reference.training
    assert not torch.equal(trainer.policy.table, before)


def test_a_policy_step_leaves_the_reward_and_a_reward_step_the_policy(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    trainer = make_trainer(small_config, mlp=True)
    gathered = trainer._gather()
    network = [p.detach().clone() for p in trainer.reward.parameters()]
    trainer.policy_step(gathered)
    assert all(torch.equal(a, b) for a, b in zip(network, trainer.reward.parameters(), strict=True))
    table = trainer.policy.table.detach().clone()
    trainer.reward_step(gathered)
    assert torch.equal(table, trainer.policy.table)
    assert not any(torch.equal(a, b) for a, b in zip(network, trainer.reward.parameters(), strict=True))


# PPO


def test_ppo_starts_from_a_ratio_of_exactly_one(make_trainer: Make, small_config: BiLevelConfig) -> None:
    config = replace(small_config, policy=replace(small_config.policy, kind="ppo", micro_batch_size=5))
    trainer = make_trainer(config)
    for _ in range(3):
        metrics = trainer.policy_step(trainer._gather())
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
        assert metrics["approx_kl"] == metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("family", ["llama", "gpt2 with dropout"])
def test_ppo_ratio_starts_at_one_for_language_models(family: str, small_config: BiLevelConfig) -> None:
    """Decoding with a cache rounds differently, and dropout scores another policy: neither may show in the ratio."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 23, "bos_token_id": 20, "eos_token_id": 21, "pad_token_id": 22}
    if family == "llama":
        shape = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **small
        )
    else:
        shape = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **small)
        assert shape.resid_pdrop > 0
    policy, reference = (transformers.AutoModelForCausalLM.from_config(shape) for _ in range(2))
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    reference.load_state_dict(policy.state_dict())
    rows = [TokenizedDemonstration(prompt_ids=(20, i, i + 1), response_ids=(3, 21), truncated=False) for i in range(16)]
    from irlfast.rewards import RewardModel, RewardModelConfig

    trainer = BiLevelTrainer(
        policy=policy,
        engine=TransformersEngine(policy, eos_token_id=21, pad_token_id=22),
        reward=RewardModel(RewardModelConfig(hidden_size=34)),
        demonstrations=rows,
        heldout=rows[:4],
        config=replace(small_config, prompts_per_step=8, policy=PolicyConfig(kind="ppo")),
        pad_token_id=22,
        reference=reference,
    )
    for _ in range(2):
        metrics = trainer.policy_step(trainer._gather())
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
        assert metrics["approx_kl"] == metrics["clip_fraction"] == 0.0
        assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 4), (3, 1), (2, 5)])
def test_ppo_takes_epochs_times_minibatches_steps_over_all_rows(
    make_trainer: Make, small_config: BiLevelConfig, epochs: int, minibatches: int
) -> None:
    """12 rows in 5 parts: as even as can be, and still 5 (ceil(12 / 5) = 3 rows a part would make 4)."""
    policy = replace(small_config.policy, kind="ppo", epochs=epochs, minibatches=minibatches)
    trainer = make_trainer(replace(small_config, policy=policy))
    seen: list[list[list[int]]] = []
    given: list[tuple[list[int], float]] = []
    update = trainer.policy_update._update

    def noted(samples: Rollouts, targets: Targets, part: list[int]) -> dict[str, float]:
        seen.append(samples.input_ids[part].tolist())
        given.extend(zip(seen[-1], targets.advantages[part].tolist(), strict=True))
        return update(samples, targets, part)

    trainer.policy_update._update = noted  # type: ignore[method-assign]
    gathered = trainer._gather()
    metrics = trainer.policy_step(gathered)
    assert trainer.policy_optimizer.step_count == len(seen) == epochs * minibatches
    assert trainer.policy_optimizer.total_steps == 4 * epochs * minibatches
    for epoch in range(epochs):
        parts = seen[epoch * minibatches : (epoch + 1) * minibatches]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(row for part in parts for row in part) == sorted(gathered.samples.input_ids.tolist())
    # The policy is still the reference, so a return is the reward; shuffled rows must keep their own advantages.
    rewards = trainer.rewards(gathered.samples)
    expected = (rewards - rewards.mean()) * (12 / 11) / trainer.reward.normalizer.scale
    own = dict(zip(map(tuple, gathered.samples.input_ids.tolist()), expected.tolist(), strict=True))
    for row, advantage in given:
        assert advantage == pytest.approx(own[tuple(row)], abs=1e-5)
    assert metrics["approx_kl"] > 0
    assert metrics["ratio_max"] > 1.0


# Around the loop


def test_fit_reward_scale_standardises_demonstrations_and_samples(
    make_trainer: Make, small_config: BiLevelConfig
) -> None:
    trainer = make_trainer(small_config)
    gathered: list[Experience] = []
    gather = trainer._gather
    trainer._gather = lambda: gathered.append(gather()) or gathered[-1]  # type: ignore[func-returns-value, method-assign]
    trainer.fit_reward_scale()
    experts, samples = gathered[0].experts, gathered[0].samples
    pooled = torch.cat([trainer.reward.features(*trainer._score(s).inputs) for s in (experts, samples)])
    assert len(pooled) == 16 + 12
    torch.testing.assert_close(pooled.mean(0), torch.zeros(7), rtol=0, atol=1e-5)
    varies = pooled.std(0, correction=0) > 0
    torch.testing.assert_close(pooled.std(0, correction=0)[varies], torch.ones(int(varies.sum())), rtol=0, atol=1e-4)
    assert int(varies.sum()) >= 5


def test_checkpoints_hold_what_extra_state_writes_and_load_by_themselves(
    toy_rows: Callable[..., list[TokenizedDemonstration]],
    make_trainer: Make,
    small_config: BiLevelConfig,
    tmp_path: Path,
) -> None:
    trainer = make_trainer(small_config, out=tmp_path)
    trainer._extra_state = lambda policy: (policy / "tokenizer.json").write_text("{}") and None
    trainer.train()
    latest = tmp_path / "checkpoints" / "step-4"
    files = {str(path.relative_to(latest)) for path in latest.rglob("*") if path.is_file()}
    assert files == {
        *("policy/model.safetensors", "policy/tokenizer.json", "reward/config.json", "reward/model.safetensors"),
        *("optimizers.pt", "state.json", "manifest.json"),
    }
    reward = type(trainer.reward).from_pretrained(latest / "reward")
    gathered = trainer._gather()
    features, mask = gathered.scored.inputs[0], gathered.samples.response_mask
    assert torch.equal(reward.serve(features, mask), trainer.reward.serve(features, mask))
    assert float(reward.normalizer.count) == float(trainer.reward.normalizer.count) == 4 * 12


def test_a_run_without_a_folder_returns_its_last_evaluation(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    assert trainer.train() == trainer.evaluate()
    untrained = make_trainer(replace(small_config, iterations=0))
    assert untrained.train()["kl"] == 0.0


def test_a_second_run_in_the_same_folder_is_refused(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path
) -> None:
    make_trainer(small_config, out=tmp_path).train()
    with pytest.raises(FileExistsError, match="choose another --out, or --resume this run"):
        make_trainer(small_config, out=tmp_path).train()


def test_a_diverged_reward_stops_the_run_and_names_the_value(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    with torch.no_grad():
        trainer.reward.network[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"rewards\[0\] = nan is not finite: the reward model has diverged"):
        trainer.policy_step(trainer._gather())
    with pytest.raises(ValueError, match=r"expert_rewards\[0\] is nan"):
        trainer.reward_step(trainer._gather())


def test_what_a_trainer_needs_is_asked_for(
    make_trainer: Make, small_config: BiLevelConfig, toy_rows: Callable[..., list[TokenizedDemonstration]]
) -> None:
    policy = toy.ToyPolicy()
    good = make_trainer(small_config)
    arguments: dict[str, Any] = {
        "policy": policy,
        "engine": TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD),
        "reward": good.reward,
        "demonstrations": toy_rows(4),
        "heldout": toy_rows(4),
        "config": small_config,
        "pad_token_id": toy.PAD,
        "reference": toy.ToyPolicy(),
    }
    entropy = replace(small_config, regularizer="entropy")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"reference": None, "features": toy.ToyFeatures()}, "regularizer='kl' needs a reference model"),
        ({"reference": None, "config": entropy}, "features=None needs a reference model"),
        ({"reference": policy}, "reference is the policy itself: pass a frozen copy"),
        ({"heldout": []}, "no held-out demonstrations: keep at least one row apart"),
        ({"demonstrations": []}, "nothing to draw demonstrations from: the list is empty"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            BiLevelTrainer(**{**arguments, **change})
    BiLevelTrainer(**{**arguments, "reference": None, "features": toy.ToyFeatures(), "config": entropy})
