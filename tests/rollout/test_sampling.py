import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlfast.rollout import SamplingParams, sample_tokens
from irlfast.rollout.sampling import _SHORTLIST, kept_candidates


def nucleus(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """{token: log-prob} of the distribution to sample from, one token at a time in plain Python."""
    scores = [value / temperature for value in logits]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    if top_k:
        order = order[:top_k]
    log_total = math.log(math.fsum(math.exp(scores[token]) for token in order))
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += math.exp(scores[token] - log_total)
        if mass >= top_p:
            break
    log_kept = math.log(math.fsum(math.exp(scores[token]) for token in kept))
    return {token: scores[token] - log_kept for token in kept}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_tokens_and_logprobs_are_those_of_the_truncated_distribution(seed, vocabulary, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(vocabulary, dtype=torch.float64, generator=generator)
    uniforms = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sample_tokens(logits.expand(400, -1), uniforms, params)
    expected = nucleus(logits.tolist(), temperature, top_k, top_p)
    assert set(drawn.tokens.tolist()) <= expected.keys()
    # An even grid of uniform numbers hits each token as often as its probability says, to one grid step each end.
    for token, logprob in expected.items():
        assert abs(int((drawn.tokens == token).sum()) - 400 * math.exp(logprob)) <= 2
    wanted = torch.tensor([expected[token] for token in drawn.tokens.tolist()], dtype=torch.float64)
    torch.testing.assert_close(drawn.sampler_logprobs, wanted, rtol=1e-12, atol=1e-12)
    model = torch.log_softmax(logits, -1)[drawn.tokens]
    torch.testing.assert_close(drawn.model_logprobs, model, rtol=1e-12, atol=1e-12)


def test_top_k_one_and_a_tiny_top_p_are_greedy_with_logprob_zero():
    torch.manual_seed(0)
    logits = torch.randn(8, 30)
    uniforms = torch.rand(8, dtype=torch.float64)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(temperature=0)):
        drawn = sample_tokens(logits, uniforms, params)
        assert drawn.tokens.tolist() == logits.argmax(-1).tolist()
        assert drawn.sampler_logprobs.abs().max() == 0.0
        torch.testing.assert_close(drawn.model_logprobs, torch.log_softmax(logits, -1).amax(-1))


@pytest.mark.parametrize("spread", [6.0, 0.0])
def test_short_list_and_full_sort_keep_the_same_tokens(spread):
    # spread 6: a nucleus inside the short list; 0: a flat distribution, whose nucleus is longer than it.
    torch.manual_seed(0)
    vocabulary = 2 * _SHORTLIST + 1
    scores = spread * torch.randn(4, vocabulary, dtype=torch.float64) + 1e-3 * torch.randn(4, vocabulary)
    kept, ids = kept_candidates(scores, 0, 0.9)
    assert (ids.shape[1] == _SHORTLIST) == (spread == 6.0)
    for row in range(4):
        found = {int(i) for i, s in zip(ids[row], kept[row], strict=True) if s > float("-inf")}
        assert found == nucleus(scores[row].tolist(), 1.0, 0, 0.9).keys()


def test_one_flat_row_sends_the_whole_batch_past_the_short_list():
    scores = torch.zeros(2, 4 * _SHORTLIST)
    scores[0, 7] = 50.0
    kept, ids = kept_candidates(scores, 0, 0.5)
    assert ids[0, kept[0].isfinite()].tolist() == [7]
    assert int(kept[1].isfinite().sum()) == 2 * _SHORTLIST


@pytest.mark.parametrize("top_p", [1.0, 0.999])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_an_impossible_token_is_never_drawn(top_p, uniform):
    # -inf at both ends of the vocabulary, where rounding at 0 or 1 would show.
    logits = torch.tensor([[float("-inf"), 0.3, float("-inf"), 0.1, float("-inf")]])
    drawn = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParams(top_p=top_p))
    assert int(drawn.tokens) in (1, 3)
    assert drawn.sampler_logprobs.isfinite().all()


@pytest.mark.parametrize("vocabulary", [3, 4093, 50257])
@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_the_largest_uniform_number_draws_the_last_possible_token(vocabulary, spread):
    # Whatever the probabilities add up to after rounding, the point must not pass the total.
    torch.manual_seed(0)
    logits = spread * torch.randn(20, vocabulary)
    logits[:, -2] = 6.0  # heavy enough to hold the largest number's place, whatever comes before
    logits[:, -1] = float("-inf")
    largest = torch.full((20,), 1 - 2**-53, dtype=torch.float64)
    assert set(sample_tokens(logits, largest, SamplingParams()).tokens.tolist()) == {vocabulary - 2}


@pytest.mark.parametrize("shift", [-150.0, 0.0, 150.0])
def test_shifted_logits_keep_their_digits(shift):
    torch.manual_seed(0)
    logits = torch.randn(16, 50)
    uniforms = torch.rand(16, dtype=torch.float64)
    params = SamplingParams(temperature=0.7, top_p=0.9)
    plain, shifted = (sample_tokens(logits + s, uniforms, params) for s in (0.0, shift))
    assert plain.tokens.tolist() == shifted.tokens.tolist()
    torch.testing.assert_close(plain.sampler_logprobs, shifted.sampler_logprobs, atol=1e-4, rtol=0)


def test_half_precision_logits_are_computed_in_float32():
    torch.manual_seed(0)
    logits = (4 * torch.randn(8, 100)).bfloat16()
    uniforms = torch.rand(8, dtype=torch.float64)
    half = sample_tokens(logits, uniforms, SamplingParams())
    full = sample_tokens(logits.double(), uniforms, SamplingParams())
    assert half.model_logprobs.dtype == torch.float32
    assert half.tokens.tolist() == full.tokens.tolist()
    torch.testing.assert_close(half.model_logprobs.double(), full.model_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3)])
def test_nan_logits_give_nan_logprobs_and_a_token_inside_the_vocabulary(params):
    logits = torch.zeros(2, 10)
    logits[1, 4] = float("nan")
    drawn = sample_tokens(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), params)
    assert drawn.model_logprobs.isnan().tolist() == [False, True]
    assert 0 <= int(drawn.tokens[1]) < 10
