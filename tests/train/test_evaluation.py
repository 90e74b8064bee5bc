"""evaluate_policy on the toy language, where every figure can be worked out."""

import math
from collections.abc import Callable

import pytest
import torch

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.rollout import Rollouts, SamplingParams, Sequences, TransformersEngine
from irlfast.train.evaluation import evaluate_policy, response_tokens
from irlfast.train.samples import Judgement
from irlfast.train.scoring import sequence_sum

SAMPLING = SamplingParams(max_new_tokens=toy.MAX_RESPONSE, n=4)


def random_policy(seed: int) -> toy.ToyPolicy:
    policy = toy.ToyPolicy()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.nn.init.normal_(policy.table)
    return policy


def evaluate(policy: toy.ToyPolicy, rows: list[TokenizedDemonstration], **options: object) -> dict[str, float]:
    arguments: dict[str, object] = {"sampling": SAMPLING, "seed": 5, **options}
    engine = TransformersEngine(policy, eos_token_id=toy.EOS, pad_token_id=toy.PAD)
    return evaluate_policy(policy=policy, engine=engine, heldout=rows, pad_token_id=toy.PAD, **arguments)  # type: ignore[arg-type]


def test_response_tokens_keep_eos_and_drop_prompt_and_padding() -> None:
    batch = Sequences.from_token_lists([[4], [4, 4]], [[1, 2, 3], [3]], toy.PAD)
    assert response_tokens(batch) == [[1, 2, 3], [3]]


def test_figures_of_demonstrations_by_hand(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    """Uniform over four tokens, a token costs log 4 nats and the forced EOS after four tokens nothing."""
    rows = toy_rows(200)
    metrics = evaluate(toy.ToyPolicy(), rows)
    lengths = [len(row.response_ids) for row in rows]
    paid = sum(min(length, 4) for length in lengths)
    assert metrics["expert_token_logprob"] == pytest.approx(-math.log(4) * paid / sum(lengths), rel=1e-5)
    assert metrics["expert_length"] == pytest.approx(sum(lengths) / 200)
    assert metrics["expert_stopped"] == 1.0
    assert metrics["expert_repetition"] == 0.0 or metrics["expert_repetition"] < 0.2
    assert not {"kl", "reward_auc"} & set(metrics)


def test_figures_of_samples_estimate_the_exact_ones(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    policy, reference = random_policy(0), random_policy(1)
    rows = toy_rows(4000)
    metrics = evaluate(policy, rows, reference=reference)
    log_p = toy.log_probs(policy).detach().double()
    log_b = toy.log_probs(reference).detach().double()
    lengths = torch.tensor([len(s) for s in toy.all_strings()], dtype=torch.float64)
    p = log_p.exp()
    entropy, kl, length = float(-(p @ log_p)), float(p @ (log_p - log_b)), float(p @ lengths)

    def standard_error(values: torch.Tensor) -> float:
        return float((p @ values.square() - (p @ values) ** 2).sqrt()) / math.sqrt(4000)

    assert abs(metrics["entropy"] - entropy) < 4 * standard_error(log_p)
    assert abs(metrics["kl"] - kl) < 4 * standard_error(log_p - log_b)
    assert abs(metrics["length"] - length) < 4 * standard_error(lengths)
    assert metrics["kl_per_token"] == pytest.approx(metrics["kl"] / metrics["length"], rel=1e-5)
    assert metrics["stopped"] == 1.0
    assert kl > 0.5  # so that none of this holds by accident


def test_kl_to_itself_is_exactly_zero(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    policy, twin = random_policy(0), random_policy(0)
    metrics = evaluate(policy, toy_rows(50), reference=twin)
    assert metrics["kl"] == metrics["kl_per_token"] == 0.0


def test_responses_that_are_cut_off_are_not_stopped(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    rows = [*toy_rows(3), TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=(0, 1), truncated=True)]
    policy = toy.ToyPolicy()
    with torch.no_grad():
        policy.table[:, toy.EOS] = -torch.inf  # never ends by itself
    metrics = evaluate(policy, rows, sampling=SamplingParams(max_new_tokens=2, n=2))
    assert metrics["stopped"] == 0.0
    assert metrics["length"] == 2.0
    assert metrics["expert_stopped"] == 0.75


def test_reward_is_compared_between_demonstrations_and_samples(
    toy_rows: Callable[..., list[TokenizedDemonstration]],
) -> None:
    """A policy that always says 0000: a reward of counted zeros separates it from what has fewer."""
    policy = toy.ToyPolicy()
    with torch.no_grad():
        policy.table[:, 0] = 100.0
    rows = toy_rows(64)

    def zeros(sequences: Sequences) -> torch.Tensor:
        return ((sequences.input_ids == 0) & sequences.response_mask).sum(1).float()

    metrics = evaluate(policy, rows, reward=zeros)
    counts = [row.response_ids.count(0) for row in rows]
    assert metrics["reward_sample"] == 4.0
    assert metrics["reward_expert"] == pytest.approx(sum(counts) / 64)
    assert metrics["reward_auc"] == pytest.approx(counts.count(4) / 2 / 64)
    assert metrics["repetition"] == 0.0  # 0000 and EOS: two 4-grams, both new


def test_one_sample_a_prompt_the_same_for_a_seed_and_sample_metrics_join(
    toy_rows: Callable[..., list[TokenizedDemonstration]],
) -> None:
    seen: list[Rollouts] = []

    def count(samples: Rollouts) -> dict[str, float]:
        seen.append(samples)
        return {"rows": float(len(samples))}

    policy, rows = random_policy(3), toy_rows(40)
    first, second, third = (evaluate(policy, rows, seed=seed, sample_metrics=count) for seed in (5, 5, 6))
    assert first == second
    assert first != third
    assert first["rows"] == 40.0
    assert torch.equal(seen[0].groups, torch.arange(40))
    logprob = sequence_sum(seen[0].model_logprobs, seen[0])
    assert first["entropy"] == pytest.approx(float(-logprob.mean()), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_keeps_its_mode_and_gets_no_gradient(
    toy_rows: Callable[..., list[TokenizedDemonstration]], training: bool
) -> None:
    policy = toy.ToyPolicy().train(training)
    evaluate(policy, toy_rows(4))
    assert policy.training is training
    assert policy.table.grad is None

    def broken(samples: Rollouts) -> dict[str, float]:
        raise RuntimeError("no figures")

    with pytest.raises(RuntimeError, match="no figures"):
        evaluate(policy, toy_rows(4), sample_metrics=broken)
    assert policy.training is training


def test_what_the_reward_follows_is_a_rank_correlation(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    """A reward that is the length, one that is its opposite in another scale, and one that is constant."""
    policy, rows = random_policy(0), toy_rows(50)

    def length(sequences: Sequences) -> torch.Tensor:
        return sequences.response_lengths.float()

    assert evaluate(policy, rows, reward=length)["reward_length"] == pytest.approx(1.0)
    assert evaluate(policy, rows, reward=lambda s: -length(s).exp())["reward_length"] == pytest.approx(-1.0)
    assert evaluate(policy, rows, reward=lambda s: torch.ones(len(s)))["reward_length"] == 0.0


def test_components_of_a_reward_are_reported_by_name(toy_rows: Callable[..., list[TokenizedDemonstration]]) -> None:
    seen: list[int] = []

    def judge(sequences: Sequences) -> Judgement:
        rewards = sequences.response_lengths.float()
        return Judgement(rewards=rewards, components={"style": 2 * rewards})

    metrics = evaluate(
        random_policy(0), toy_rows(20), reward=judge, on_judged=lambda *sides: seen.extend(len(s) for s, _ in sides)
    )
    assert metrics["style_sample"] == pytest.approx(2 * metrics["reward_sample"])
    assert metrics["style_expert"] == pytest.approx(2 * metrics["reward_expert"])
    assert seen == [20, 20]
