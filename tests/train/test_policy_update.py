"""The policy updates: what each kind ascends, exactly; what a step is made of; and PPO's critic.

On the toy language every expectation can be summed over the 121 strings, so a step's gradient has an exact value.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from irlfast.eval import toy
from irlfast.losses import gae
from irlfast.rewards import TokenRewards
from irlfast.rollout import Sequences
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, RewardConfig
from irlfast.train.config import CriticConfig
from irlfast.train.critic import Critic, explained_variance, value_loss
from irlfast.train.policy_kinds import RECIPES

Make = Callable[..., BiLevelTrainer]
NO_CLIPPING = OptimizerConfig(max_grad_norm=0.0)
RATIO_KINDS = [kind for kind, recipe in RECIPES.items() if recipe.ratio]


def gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.flatten().double() @ b.flatten().double() / (a.double().norm() * b.double().norm()))


def exact_rewards(trainer: BiLevelTrainer) -> Tensor:
    weights = trainer.reward.network[0].weight.detach().double()[0]
    return toy.features() @ weights[: toy.NUM_FEATURES]


def response_lengths() -> Tensor:
    return torch.tensor([len(string) for string in toy.all_strings()], dtype=torch.float64)


def big_batch(config: BiLevelConfig, policy: PolicyConfig, samples: int = 10_000) -> BiLevelConfig:
    """Many samples of one prompt in one micro-batch, against a random reference."""
    return replace(
        config,
        beta=0.7,
        rollout=replace(config.rollout, n=samples),
        policy=replace(policy, micro_batch_size=samples, optimizer=NO_CLIPPING),
        reward=RewardConfig(token_statistics=False),
    )


def away_from_the_reference(trainer: BiLevelTrainer) -> BiLevelTrainer:
    with torch.no_grad():
        trainer.policy.table += torch.randn(trainer.policy.table.shape)
    return trainer


# What each kind ascends

# How much a response's score counts in the loss: sums over tokens, means over its own, or over the batch's tokens.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "seq_mean_token_sum": lambda lengths, p: torch.ones_like(lengths),
    "seq_mean_token_mean": lambda lengths, p: 1 / lengths,
    "token_mean": lambda lengths, p: torch.ones_like(lengths) / (p * lengths).sum(),
    "token_sum": lambda lengths, p: torch.ones_like(lengths) / toy.MAX_RESPONSE,
}


@pytest.mark.parametrize("kind", list(RECIPES))
def test_every_kind_ascends_what_its_recipe_says(make_trainer: Make, small_config: BiLevelConfig, kind: str) -> None:
    """Sum over strings of pi(y) w(|y|) (R - E[R]) / s grad log pi(y); s is R's deviation for grpo, else 1."""
    trainer = away_from_the_reference(make_trainer(big_batch(small_config, PolicyConfig(kind=kind))))
    log_pi = toy.log_probs(trainer.policy)
    log_base = toy.log_probs(trainer.reference).detach()
    p = log_pi.detach().exp().double()
    returns = exact_rewards(trainer) - 0.7 * (log_pi - log_base).detach().double()
    centred = returns - (p * returns).sum()
    recipe = RECIPES[kind]
    if recipe.advantage == "grpo":
        centred = centred / (p * centred.square()).sum().sqrt()
    weights = WEIGHTS[recipe.aggregation](response_lengths(), p)
    (exact,) = torch.autograd.grad((p * weights * centred * log_pi).sum(), trainer.policy.table)
    trainer.policy_step(trainer._gather())
    estimate = -gradient(trainer.policy)
    if recipe.advantage != "grpo":
        estimate = estimate * trainer.reward.normalizer.scale
    assert cosine(estimate, exact) > 0.99
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1.0, abs=0.08)


def policy_gradient(trainer: BiLevelTrainer, *, steps: int = 1) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Estimated and exact gradient of E[R] after `steps` policy steps in which the critic learns, not the policy."""
    log_base = toy.log_probs(trainer.reference).detach()
    log_base = log_base if trainer.config.regularizer == "kl" else torch.zeros(121)
    log_pi = toy.log_probs(trainer.policy)
    objective = (log_pi.exp() * (exact_rewards(trainer) - 0.7 * (log_pi - log_base))).sum()
    (exact,) = torch.autograd.grad(objective, trainer.policy.table)
    table = trainer.policy.table.detach().clone()
    for _ in range(steps):
        metrics = trainer.policy_step(trainer._gather())
        with torch.no_grad():
            trainer.policy.table.copy_(table)
    return -gradient(trainer.policy) * trainer.reward.normalizer.scale, exact.flatten(), metrics


@pytest.mark.parametrize("regularizer", ["kl", "entropy"])
@pytest.mark.parametrize("reads", ["policy", "own"])
def test_a_critic_at_lambda_one_cannot_turn_the_gradient(
    make_trainer: Make, small_config: BiLevelConfig, regularizer: str, reads: str
) -> None:
    policy = PolicyConfig(kind="ppo", advantage="gae", critic=CriticConfig(reads=reads))  # type: ignore[arg-type]
    config = replace(big_batch(small_config, policy), regularizer=regularizer)  # type: ignore[arg-type]
    estimate, exact, metrics = policy_gradient(away_from_the_reference(make_trainer(config)))
    assert cosine(estimate, exact) > 0.98
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1.0, abs=0.1)
    assert metrics["value_loss"] > 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_critic_below_lambda_one_leans_on_what_it_learned(
    make_trainer: Make, small_config: BiLevelConfig, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The deliberate break: V_t read from the state after token t, which knows what the token did."""
    critic = CriticConfig(lam=0.9, clip=None, optimizer=OptimizerConfig(lr=0.03))
    policy = PolicyConfig(kind="ppo", advantage="gae", critic=critic)
    trainer = away_from_the_reference(make_trainer(big_batch(small_config, policy, 1500)))
    if broken:
        monkeypatch.setattr(Critic, "values", lambda self, states: self.head((states - self.mean) / self.std)[..., 0])
    estimate, exact, metrics = policy_gradient(trainer, steps=30)
    if broken:
        assert cosine(estimate, exact) < 0.8
    else:
        assert cosine(estimate, exact) > 0.9
        assert metrics["explained_variance"] > 0.2


@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo", "gae"])
def test_dense_rewards_ascend_the_same_objective(
    make_trainer: Make, small_config: BiLevelConfig, advantage: str
) -> None:
    """The features of the toy add up over tokens, so the reward's prefix differences are its own terms."""
    policy = PolicyConfig(kind="ppo", advantage=advantage, dense_rewards=True)  # type: ignore[arg-type]
    estimate, exact, _ = policy_gradient(away_from_the_reference(make_trainer(big_batch(small_config, policy))))
    assert cosine(estimate, exact) > 0.98
    assert float(estimate.norm() / exact.norm()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["mean", "sum", "prefix"])
def test_dense_rewards_sum_to_the_reward_as_served(
    make_trainer: Make, small_config: BiLevelConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    trainer = make_trainer(replace(small_config, policy=PolicyConfig(dense_rewards=True, optimizer=NO_CLIPPING)))
    gathered = trainer._gather()
    mask = gathered.samples.response_mask
    terms = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), 0.0)
    given = TokenRewards(terms, kind)  # type: ignore[arg-type]
    monkeypatch.setattr(trainer.reward, "token_rewards", lambda *inputs: given)
    trainer.reward.normalizer.update(torch.tensor([1.0, 5.0]))
    expected = trainer.reward.normalizer.normalize(given.total(mask))
    torch.testing.assert_close(trainer._token_rewards(gathered).sum(1), expected, rtol=1e-5, atol=1e-6)


# Where grpo's weights move the optimum, and where they do not


def test_length_means_move_the_optimum_of_a_policy_that_is_not_free() -> None:
    """A policy that draws every token alike: rloo stands still at the best one, a mean over own tokens does not."""
    counts = torch.zeros(121, 4, dtype=torch.float64)  # how often each string draws each token; the fifth is forced
    for row, string in enumerate(toy.all_strings()):
        for token in string[: toy.MAX_BODY]:
            counts[row, token] += 1
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def ascent(weights: Tensor) -> Tensor:
        log_pi = counts @ torch.log_softmax(logits, 0)
        p, returns = log_pi.detach().exp(), toy.true_rewards() - log_pi.detach()
        return torch.autograd.grad((p * weights * (returns - (p * returns).sum()) * log_pi).sum(), logits)[0]

    for _ in range(2000):
        step = ascent(torch.ones(121))
        with torch.no_grad():
            logits += 0.3 * step
    assert float(ascent(torch.ones(121)).norm()) < 1e-8
    assert float(ascent(1 / response_lengths()).norm()) > 0.01


def test_where_all_returns_are_equal_every_kind_stands_still(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """The optimum of a free policy: r - beta (log pi - log b) is one constant."""
    for kind in RECIPES:
        config = replace(
            small_config,
            regularizer="entropy",
            policy=PolicyConfig(kind=kind, optimizer=NO_CLIPPING),  # type: ignore[arg-type]
            reward=RewardConfig(token_statistics=False),
        )
        trainer = make_trainer(config, dtype=torch.float64)
        with torch.no_grad():
            trainer.policy.table.zero_()
            trainer.reward.network[0].weight.zero_()
        gathered = trainer._gather()
        one = gathered.samples.select([0] * len(gathered.samples))  # twelve times the same string: returns are equal
        trainer.policy_update.step(one, torch.zeros(12), gathered.scored, beta=1.0, counter=0)
        assert float(gradient(trainer.policy).norm()) == 0.0, kind


# What a step is made of


def test_shaped_rewards_and_gae_of_one_batch_by_hand(make_trainer: Make, small_config: BiLevelConfig) -> None:
    policy = PolicyConfig(kind="ppo", advantage="gae", critic=CriticConfig(lam=0.8), optimizer=NO_CLIPPING)
    trainer = away_from_the_reference(make_trainer(replace(small_config, beta=0.3, policy=policy)))
    update, gathered = trainer.policy_update, trainer._gather()
    samples, mask = gathered.samples, gathered.samples.response_mask
    served = torch.linspace(-1, 1, len(samples))
    values = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)), 0.0)
    targets = update._token_targets(samples, served, gathered.scored, values, 0.3)
    penalty = 0.3 * (samples.model_logprobs - gathered.scored.base_logprobs)
    for row in range(len(samples)):
        places = mask[row].nonzero()[:, 0].tolist()
        advantage, value = 0.0, 0.0
        for t in reversed(places):
            reward = -float(penalty[row, t]) + (float(served[row]) if t == places[-1] else 0.0)
            advantage = reward + value - float(values[row, t]) + 0.8 * advantage
            value = float(values[row, t])
            assert float(targets.advantages[row, t]) == pytest.approx(advantage, abs=1e-5)
            assert float(targets.returns[row, t]) == pytest.approx(advantage + value, abs=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("options", [{"kind": k} for k in RECIPES] + [{"kind": "ppo", "advantage": "gae"}])
def test_micro_batches_add_up_to_the_same_step(
    make_trainer: Make, small_config: BiLevelConfig, options: dict[str, str]
) -> None:
    def step(size: int) -> tuple[Tensor, Tensor | None]:
        policy = PolicyConfig(**options, micro_batch_size=size, optimizer=NO_CLIPPING)  # type: ignore[arg-type]
        trainer = away_from_the_reference(make_trainer(replace(small_config, policy=policy), dtype=torch.float64))
        if trainer.policy_update.critic is not None:  # the first micro-batch alone decides it otherwise
            trainer.policy_update.critic.fitted.fill_(True)
        trainer.policy_step(trainer._gather())
        critic = trainer.policy_update.critic
        return gradient(trainer.policy), None if critic is None else gradient(critic)

    whole = step(256)
    assert float(whole[0].norm()) > 1e-3
    for size in (5, 1):
        got = step(size)
        torch.testing.assert_close(got[0], whole[0], rtol=1e-6, atol=1e-7)
        if whole[1] is not None:
            assert got[1] is not None
            torch.testing.assert_close(got[1], whole[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", RATIO_KINDS)
def test_ratio_starts_at_one_and_several_steps_move_it(
    make_trainer: Make, small_config: BiLevelConfig, kind: str
) -> None:
    policy = PolicyConfig(kind=kind, optimizer=OptimizerConfig(lr=0.05, max_grad_norm=0.0))  # type: ignore[arg-type]
    first = make_trainer(replace(small_config, policy=policy))
    metrics = first.policy_step(first._gather())
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
    second = make_trainer(replace(small_config, policy=replace(policy, epochs=2, minibatches=2)))
    metrics = second.policy_step(second._gather())
    assert second.policy_optimizer.step_count == 4
    assert metrics["ratio_max"] > 1.0


def test_dapo_leaves_out_prompts_that_tell_nothing(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(replace(small_config, policy=PolicyConfig(kind="dapo", optimizer=NO_CLIPPING)))
    gathered = trainer._gather()
    samples = gathered.samples
    advantages = torch.linspace(-1, 1, 12)
    groups = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    samples = replace(samples, groups=groups)
    advantages[4:8] = 0.0
    advantages[0] = 0.0  # one that happens to sit at its group's mean stays
    assert trainer.policy_update._kept(samples, advantages) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert trainer.policy_update._kept(samples, torch.zeros(12)) == list(range(12))
    metrics = trainer.policy_update.step(
        replace(samples, groups=torch.arange(12)), torch.randn(12), gathered.scored, beta=1.0, counter=0
    )
    assert metrics["dropped"] == 0.0  # every group of one tells nothing: the step is taken, with gradient 0
    assert metrics["grad_norm"] == 0.0


def test_aggregation_and_clip_can_be_chosen(make_trainer: Make, small_config: BiLevelConfig) -> None:
    def step(**options: object) -> Tensor:
        policy = PolicyConfig(optimizer=OptimizerConfig(lr=0.05, max_grad_norm=0.0), epochs=3, **options)  # type: ignore[arg-type]
        trainer = make_trainer(replace(small_config, policy=policy))
        trainer.policy_step(trainer._gather())
        return trainer.policy.table.detach()

    plain = step(kind="ppo")
    assert torch.equal(plain, step(kind="ppo", clip=(0.2, 0.2)))
    assert not torch.equal(plain, step(kind="ppo", clip=(0.01, 0.01)))
    assert not torch.equal(plain, step(kind="ppo", aggregation="token_mean"))
    assert torch.equal(step(kind="grpo"), step(kind="ppo", advantage="grpo", aggregation="seq_mean_token_mean"))


# The critic


def test_values_are_of_the_state_before_the_token(make_trainer: Make, small_config: BiLevelConfig) -> None:
    trainer = make_trainer(small_config)
    critic = Critic(trainer.policy, CriticConfig(hidden_sizes=()))
    torch.nn.init.normal_(critic.head[0].weight)
    states = torch.randn(3, 6, toy.NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    values = critic.values(states)
    assert values.shape == (3, 6)
    assert torch.equal(values[:, 0], torch.zeros(3))
    torch.testing.assert_close(values[:, 1:], (states @ critic.head[0].weight[0])[:, :-1])
    assert torch.equal(Critic(trainer.policy, CriticConfig()).values(states), torch.zeros(3, 6))


def test_critic_standardises_what_it_reads_once(make_trainer: Make, small_config: BiLevelConfig) -> None:
    critic = Critic(make_trainer(small_config).policy, CriticConfig())
    rows = Sequences.from_token_lists([[toy.BOS]] * 2, [[0, toy.EOS], [1, 2, toy.EOS]], toy.PAD)
    states = 100.0 + 7.0 * torch.randn(2, 4, toy.NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    states[..., 3] = 4.0  # one that does not vary
    critic.fit_scale(rows, states)
    read = torch.cat([states[0, :2], states[1, :3]])  # the states before two and three response tokens
    torch.testing.assert_close(critic.mean, read.mean(0))
    torch.testing.assert_close(critic.std[:3], read.std(0, correction=0)[:3])
    assert float(critic.std[3]) == 1.0
    before = critic.mean.clone()
    critic.fit_scale(rows, torch.zeros_like(states))
    assert torch.equal(critic.mean, before)


def test_value_loss_is_clipped_around_the_old_values() -> None:
    mask = torch.tensor([[True, True, True, False]])
    old, returns = torch.tensor([[0.0, 0.0, 1.0, 9.0]]), torch.tensor([[1.0, -1.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, -0.1, 1.5, 7.0]], requires_grad=True)
    loss = value_loss(values, old, returns, mask, 0.2)
    # .5 moved beyond .2 towards 1: counts as .2, without gradient. -.1 is inside. 1.5 overshot: the worse one counts.
    assert float(loss.detach()) == pytest.approx(0.5 * (0.8**2 + 0.9**2 + 0.5**2) / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, 0.9, 0.5, 0.0]]) / 3)
    values = values.detach()
    assert float(value_loss(values, old, returns, mask, None)) == pytest.approx(0.5 * (0.25 + 0.81 + 0.25) / 3)
    assert float(value_loss(values, old, returns, torch.zeros_like(mask), 0.2)) == 0.0


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert explained_variance(returns + 5.0, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0.0


def test_the_critic_learns_the_exact_values(make_trainer: Make, small_config: BiLevelConfig) -> None:
    """A policy that stands still: V of the empty prefix is the mean return, for the served reward less the penalty."""
    critic = CriticConfig(clip=None, optimizer=OptimizerConfig(lr=0.03))
    policy = PolicyConfig(
        kind="ppo", advantage="gae", critic=critic, micro_batch_size=2000, optimizer=OptimizerConfig(lr=1e-12)
    )
    config = replace(small_config, policy=policy, rollout=replace(small_config.rollout, n=500))
    trainer = make_trainer(config)
    for _ in range(60):
        metrics = trainer.policy_step(trainer._gather())
    assert metrics["explained_variance"] > 0.25
    gathered = trainer._gather()
    _, values = trainer.policy_update._old_pass(gathered.samples)
    assert values is not None
    assert float(values[0, 1]) == pytest.approx(metrics["return"], abs=0.15)


def test_gae_of_a_perfect_critic_is_zero_in_the_mean() -> None:
    """A check of the convention used here: gamma 1, nothing after the end."""
    values = torch.tensor([[0.5, 0.25, 0.125]])
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), values, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.ones(1, 3))
    torch.testing.assert_close(advantages, 1.0 - values)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vtrace"}, r"policy\.kind = 'vtrace', expected one of \('reinforce', "),
        ({"kind": "rloo", "epochs": 2}, "rloo takes one step on each batch"),
        ({"kind": "grpo", "dense_rewards": True}, "dense_rewards with advantage grpo"),
    ],
)
def test_bad_policy_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**options)  # type: ignore[arg-type]


def test_bad_critic_options_are_refused() -> None:
    for options, message in [
        ({"lam": 1.5}, r"critic\.lam = 1\.5"),
        ({"clip": 0.0}, r"critic\.clip = 0\.0"),
        ({"hidden_sizes": (0,)}, r"critic\.hidden_sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            CriticConfig(**options)  # type: ignore[arg-type]
