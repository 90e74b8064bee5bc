"""What an IQ-trained policy is watched by: held-out likelihood and TD error, and its own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from irlfast.data import TokenizedDemonstration
from irlfast.eval.generation import chrf, distinct_n, rouge, self_bleu
from irlfast.eval.ranking import correlations
from irlfast.losses import iq_learn_loss
from irlfast.rewards.iq import IQReward, IQStatistics, iq_statistics
from irlfast.rollout import RolloutEngine, Rollouts, SamplingParams, Sequences
from irlfast.rollout.modules import eval_mode

from .evaluation import response_tokens

# (reference text, answer text) -> score, more is better.
TaskMetric = Callable[[str, str], float]
DecodeText = Callable[[Sequence[int]], str]


class Batch(NamedTuple):
    """Sequences and [B] bool, which of their responses ended with EOS."""

    sequences: Sequences
    ended: torch.Tensor

    @classmethod
    def of_demonstrations(
        cls, rows: Sequence[TokenizedDemonstration], pad_token_id: int, device: torch.device
    ) -> Batch:
        sequences = Sequences.from_token_lists(
            [list(row.prompt_ids) for row in rows], [list(row.response_ids) for row in rows], pad_token_id
        )
        ended = torch.tensor([not row.truncated for row in rows], device=device)
        return cls(sequences.to(device), ended)

    @classmethod
    def of_rollouts(cls, rollouts: Rollouts) -> Batch:
        ended = [reason == "stop" for reason in rollouts.finish_reasons]
        return cls(rollouts, torch.tensor(ended, device=rollouts.input_ids.device))

    def statistics(self, model: nn.Module, **options: Any) -> IQStatistics:
        s = self.sequences
        return iq_statistics(model, s.input_ids, s.attention_mask, s.response_mask, self.ended, **options)


class TokenMeans:
    """Means over tokens of several batches, from each batch's means and number of tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float], tokens: int) -> None:
        self.tokens += tokens
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * tokens

    def result(self) -> dict[str, float]:
        means = {name: total / max(1, self.tokens) for name, total in self._sums.items()}
        for name in means:
            if name.endswith("reward_std"):  # of all tokens: not a mean of the batches' own
                prefix = name.removesuffix("reward_std")
                means[name] = max(0.0, means[f"{prefix}td_error"] - means[f"{prefix}reward"] ** 2) ** 0.5
        return means


@torch.no_grad()
def evaluate_heldout(
    policy: nn.Module,
    rows: Sequence[TokenizedDemonstration],
    *,
    pad_token_id: int,
    batch_size: int,
    reference: nn.Module | None = None,
    gamma: float = 1.0,
    temperature: float = 1.0,
    truncated: Any = "bootstrap",
) -> dict[str, float]:
    """Means over the held-out responses' tokens: the metrics of `losses.iq_learn_loss`, and log pi as logprob.

    nll is that at `temperature`. With a reference, kl is the exact KL(pi || reference), nats a token.
    """
    options = {"temperature": temperature, "truncated": truncated}
    device = next(policy.parameters()).device
    means = TokenMeans()
    with eval_mode(policy):
        for low in range(0, len(rows), batch_size):
            batch = Batch.of_demonstrations(rows[low : low + batch_size], pad_token_id, device)
            stats = batch.statistics(policy, reference=reference, **options)
            result = iq_learn_loss(
                stats.q,
                stats.lse,
                stats.mask,
                ended=batch.ended,
                gamma=gamma,
                logprob=stats.logprob,
                kl=stats.kl,
                **options,
            )
            means.add({name: float(value) for name, value in result.metrics.items()}, int(stats.mask.sum()))
    found = means.result()
    return {**found, "logprob": -found["nll"]}


class SampleEvaluation(NamedTuple):
    """A policy's answers, the sum of r_t of each, and what is measured of them."""

    samples: Rollouts
    returns: list[float]
    metrics: dict[str, float | None]


@torch.no_grad()
def evaluate_samples(
    engine: RolloutEngine,
    reward: IQReward,
    rows: Sequence[TokenizedDemonstration],
    sampling: SamplingParams,
    *,
    decode: DecodeText | None,
    task_metric: TaskMetric | None,
    batch_size: int,
) -> SampleEvaluation:
    """Sample `sampling.n` answers to each row's prompt; quality, diversity, and how the reward ranks them.

    Args:
        decode: token ids to text. Without it n-grams are of token ids, and nothing that reads text is measured.
        task_metric: score of an answer against the row's own response, both as text.

    Returns:
        The answers, their returns, and the metrics length, stopped (share that ended by themselves), distinct_1,
        distinct_2, return (mean sum of r_t) and, with `decode`, self_bleu (n of at least 2), rouge_l, chrf, task, and
        spearman_rouge_l, spearman_task (rank correlation of return and score over all answers; NaN where either is
        constant).
    """
    samples = engine.generate([list(row.prompt_ids) for row in rows], sampling)
    tokens = response_tokens(samples)
    returns: list[float] = []
    for low in range(0, len(samples), batch_size):
        part = Batch.of_rollouts(samples.select(slice(low, low + batch_size)))
        s = part.sequences
        returns += reward(s.input_ids, s.attention_mask, s.response_mask, part.ended).returns.tolist()
    found: dict[str, float | None] = {
        "length": _mean([len(t) for t in tokens]),
        "stopped": _mean([reason == "stop" for reason in samples.finish_reasons]),
        "return": _mean(returns),
    }
    if decode is None:
        found |= {"distinct_1": distinct_n(tokens, 1), "distinct_2": distinct_n(tokens, 2)}
        return SampleEvaluation(samples, returns, found)
    texts = [decode(t) for t in tokens]
    references = [decode(row.response_ids) for row in rows for _ in range(sampling.n)]
    words = [text.split() for text in texts]
    found |= {"distinct_1": distinct_n(words, 1), "distinct_2": distinct_n(words, 2)}
    if sampling.n > 1:
        found["self_bleu"] = self_bleu([texts[i : i + sampling.n] for i in range(0, len(texts), sampling.n)])
    scores = {"rouge_l": rouge(texts, references), "chrf": chrf(texts, references)}
    if task_metric is not None:
        scores["task"] = [task_metric(ref, text) for ref, text in zip(references, texts, strict=True)]
    for name, values in scores.items():
        found[name] = _mean(values)
        if name != "chrf":
            found[f"spearman_{name}"] = correlations(returns, values).spearman if len(values) > 1 else None
    return SampleEvaluation(samples, returns, found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
