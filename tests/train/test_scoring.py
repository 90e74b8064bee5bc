"""response_scores: aligned with the tokens, equal to a log-softmax by hand, without gradient outside the response."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.rollout import Sequences
from irlfast.train.scoring import response_scores, sequence_sum

VOCAB, PAD = 11, 0
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8]]
RESPONSES = [[9, 3], [2, 2, 5, 7, 1], [10]]


class FixedLogits(torch.nn.Module):
    """Any logits, whatever is read; notes how it was called."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, width, VOCAB, generator=generator, dtype=torch.float64) * 3
        self.logits = torch.nn.Parameter(logits)
        self.called: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        self.called = inputs
        hidden = (torch.zeros(1), self.logits.detach() + 1) if inputs.get("output_hidden_states") else None
        return SimpleNamespace(logits=self.logits, hidden_states=hidden)


@pytest.fixture
def sequences() -> Sequences:
    return Sequences.from_token_lists(PROMPTS, RESPONSES, PAD)


@pytest.fixture
def model(sequences: Sequences) -> FixedLogits:
    return FixedLogits(*sequences.input_ids.shape)


def by_hand(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and lse, token by token: logits before a response token predict it."""
    logprob, entropy, lse = (torch.zeros(logits.shape[:2], dtype=torch.float64) for _ in range(3))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for i, token in enumerate(response):
            position = len(prompt) + i
            scores = torch.log_softmax(logits[row, position - 1], dim=0)
            logprob[row, position] = scores[token]
            entropy[row, position] = -(scores.exp() * scores).sum()
            lse[row, position] = logits[row, position - 1].logsumexp(0)
    return logprob, entropy, lse


def test_statistics_stand_at_the_token_they_speak_of(model: FixedLogits, sequences: Sequences) -> None:
    scores = response_scores(model, sequences)
    for got, want in zip(scores.stats, by_hand(model.logits.detach()), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-12)
        assert not got.detach()[~sequences.response_mask].any()
    assert scores.hidden is None
    sums = sequence_sum(scores.stats.logprob, sequences)
    torch.testing.assert_close(sums.detach(), by_hand(model.logits.detach())[0].sum(1), rtol=0, atol=1e-12)


def test_only_logits_that_predict_a_response_token_receive_gradient(model: FixedLogits, sequences: Sequences) -> None:
    stats = response_scores(model, sequences).stats
    (stats.logprob.sum() + 0.3 * stats.entropy.sum()).backward()
    predicts = torch.zeros(sequences.input_ids.shape, dtype=torch.bool)
    predicts[:, :-1] = sequences.response_mask[:, 1:]
    assert model.logits.grad is not None
    touched = model.logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched, predicts)


def test_gradient_is_that_of_the_formula(model: FixedLogits, sequences: Sequences) -> None:
    response_scores(model, sequences).stats.logprob.sum().backward()
    logits = model.logits.detach().clone().requires_grad_()
    want = torch.log_softmax(logits[:, :-1], -1).gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    torch.where(sequences.response_mask[:, 1:], want, 0.0).sum().backward()
    assert model.logits.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(model.logits.grad, logits.grad, rtol=0, atol=1e-12)


def test_what_padding_holds_changes_nothing(model: FixedLogits, sequences: Sequences) -> None:
    clean = response_scores(model, sequences).stats.logprob
    garbage = Sequences(
        input_ids=torch.where(sequences.attention_mask, sequences.input_ids, 7),
        attention_mask=sequences.attention_mask,
        response_mask=sequences.response_mask,
        groups=sequences.groups,
    )
    assert torch.equal(response_scores(model, garbage).stats.logprob, clean)
    with torch.no_grad():
        model.logits[~sequences.attention_mask] = torch.nan
    assert torch.equal(response_scores(model, sequences).stats.logprob, clean)


def test_the_model_is_called_with_the_mask_and_without_a_cache(model: FixedLogits, sequences: Sequences) -> None:
    response_scores(model, sequences)
    assert set(model.called) == {"input_ids", "attention_mask", "use_cache"}
    assert model.called["use_cache"] is False
    assert torch.equal(model.called["attention_mask"], sequences.attention_mask.long())
    hidden = response_scores(model, sequences, hidden_states=True).hidden
    assert hidden is not None
    assert torch.equal(hidden, model.logits.detach() + 1)  # the last layer, not the first


def test_scores_agree_with_the_sampler(make_trainer: Any, small_config: Any) -> None:
    """What the engine recorded while it sampled is what a pass over the whole rows says."""
    trainer = make_trainer(small_config)
    samples = trainer._gather().samples
    stats = response_scores(trainer.policy, samples).stats
    torch.testing.assert_close(stats.logprob.detach(), samples.model_logprobs, rtol=0, atol=1e-6)
