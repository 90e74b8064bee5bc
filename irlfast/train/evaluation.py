"""Held-out evaluation: what a policy says to unseen prompts, set beside what the demonstrator said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration
from irlfast.eval.ranking import correlations
from irlfast.eval.text import repetition, roc_auc
from irlfast.rollout import RolloutEngine, Rollouts, SamplingParams, Sequences

from .samples import Judgement
from .scoring import response_scores, sequence_sum

RewardFunction = Callable[[Sequences], Tensor | Judgement]
OnJudged = Callable[[tuple[Sequences, Judgement], tuple[Sequences, Judgement]], None]
SampleMetrics = Callable[[Rollouts], Mapping[str, float]]


def response_tokens(sequences: Sequences) -> list[list[int]]:
    """Token ids of each response, EOS included."""
    return [ids[mask].tolist() for ids, mask in zip(sequences.input_ids, sequences.response_mask, strict=True)]


@torch.no_grad()
def evaluate_policy(
    *,
    policy: nn.Module,
    engine: RolloutEngine,
    heldout: Sequence[TokenizedDemonstration],
    sampling: SamplingParams,
    pad_token_id: int,
    seed: int,
    reward: RewardFunction | None = None,
    reference: nn.Module | None = None,
    sample_metrics: SampleMetrics | None = None,
    on_judged: OnJudged | None = None,
) -> dict[str, float]:
    """Sample one response to each held-out prompt and compare with the held-out demonstrations.

    Returns:
        expert_token_logprob: mean log-prob of the demonstrations' tokens under the policy, nats.
        length, expert_length: mean response tokens, EOS included.
        stopped, expert_stopped: share of responses that ended by themselves.
        repetition, expert_repetition: mean share of repeated 4-grams.
        entropy: mean -log pi(y|x) of the samples, nats a response (an estimate of the policy's entropy).
        kl, kl_per_token: mean log pi - log ref over the samples, nats a response and a token; with a reference only.
        reward_auc: chance that a demonstration's reward exceeds a sample's; reward_expert, reward_sample: their means.
            With a reward only, as are
        reward_length, reward_repetition: rank correlation of the samples' rewards with their length and repetition; 0
            where either does not vary.
        NAME_expert, NAME_sample: means of each component of the reward, where it has any.
        and whatever `sample_metrics` makes of the samples. `on_judged` is called with the samples and the
        demonstrations, each with what the reward says of them.
    """
    was_training = policy.training
    policy.eval()
    try:
        prompts = [list(row.prompt_ids) for row in heldout]
        samples = engine.generate(prompts, replace(sampling, n=1, seed=seed))
        experts = Sequences.from_token_lists(prompts, [list(row.response_ids) for row in heldout], pad_token_id)
        experts = experts.to(samples.input_ids.device)
        expert_stats = response_scores(policy, experts).stats
        sample_stats = response_scores(policy, samples).stats
    finally:
        policy.train(was_training)

    logprob = sequence_sum(sample_stats.logprob, samples)
    lengths = samples.response_lengths.float()
    repeated = [repetition(tokens) for tokens in response_tokens(samples)]
    metrics = {
        "expert_token_logprob": float(expert_stats.logprob.sum() / experts.response_mask.sum()),
        "length": float(lengths.mean()),
        "expert_length": float(experts.response_lengths.float().mean()),
        "stopped": sum(reason == "stop" for reason in samples.finish_reasons) / len(samples),
        "expert_stopped": sum(not row.truncated for row in heldout) / len(heldout),
        "repetition": _mean(repeated),
        "expert_repetition": _mean(repetition(tokens) for tokens in response_tokens(experts)),
        "entropy": float(-logprob.mean()),
    }
    if reference is not None:
        gap = logprob - sequence_sum(response_scores(reference, samples).stats.logprob, samples)
        metrics["kl"] = float(gap.mean())
        metrics["kl_per_token"] = float(gap.sum() / lengths.sum())
    if reward is not None:
        of_experts, of_samples = _judge(reward, experts), _judge(reward, samples)
        metrics["reward_auc"] = roc_auc(of_experts.rewards, of_samples.rewards)
        metrics["reward_expert"] = float(of_experts.rewards.mean())
        metrics["reward_sample"] = float(of_samples.rewards.mean())
        metrics["reward_length"] = _rank_correlation(of_samples.rewards, lengths)
        metrics["reward_repetition"] = _rank_correlation(of_samples.rewards, lengths.new_tensor(repeated))
        for name, values in of_experts.components.items():
            metrics[f"{name}_expert"] = float(values.mean())
            metrics[f"{name}_sample"] = float(of_samples.components[name].mean())
        if on_judged is not None:
            on_judged((samples, of_samples), (experts, of_experts))
    if sample_metrics is not None:
        metrics.update(sample_metrics(samples))
    return metrics


def _judge(reward: RewardFunction, sequences: Sequences) -> Judgement:
    said = reward(sequences)
    return said if isinstance(said, Judgement) else Judgement(rewards=said)


def _rank_correlation(rewards: Tensor, values: Tensor) -> float:
    spearman = correlations(rewards.cpu(), values.cpu()).spearman if len(rewards) > 1 else math.nan
    return 0.0 if math.isnan(spearman) else spearman


def _mean(values: object) -> float:
    numbers = list(values)  # type: ignore[call-overload]
    return sum(numbers) / len(numbers)
