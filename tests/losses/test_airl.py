"""airl_loss: GAIL's loss on f - log pi; the token form, its shaping, and what must not reach it."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from irlfast.losses import AirlObjective, RewardBatch, TokenTerms, airl_loss, airl_token_loss
from irlfast.losses.airl import shaped_token_rewards


def vectors(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]


def test_value_is_the_cross_entropy_of_f_less_log_pi() -> None:
    expert, sample, expert_logprobs, sample_logprobs = vectors(3, 5, 3, 5)
    got = airl_loss(expert, sample, expert_logprobs, sample_logprobs)
    want = softplus(expert_logprobs - expert).mean() + softplus(sample - sample_logprobs).mean()
    torch.testing.assert_close(got.loss, want)
    assert float(got.metrics["expert_logprob"]) == pytest.approx(float(expert_logprobs.mean()))
    assert float(got.metrics["expert_reward"]) == pytest.approx(float(expert.mean()))


def test_gradcheck_and_no_gradient_to_the_policy() -> None:
    rewards, logprobs = vectors(3, 5), vectors(3, 5)
    for tensor in (*rewards, *logprobs):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda e, s: airl_loss(e, s, *logprobs).loss, rewards)
    airl_loss(*rewards, *logprobs).loss.backward()
    assert logprobs[0].grad is None
    assert logprobs[1].grad is None


def test_the_objective_takes_base_and_temperature_into_the_logit() -> None:
    """p = b exp(f / beta) / Z: at f = beta (log p - log b) + const the logit is log p - log pi, whatever b and beta."""
    expert, sample, el, sl, eb, sb = vectors(3, 5, 3, 5, 3, 5)
    batch = RewardBatch(
        expert_rewards=expert,
        sample_rewards=sample,
        expert_logprobs=el,
        sample_logprobs=sl,
        expert_log_base=eb,
        log_base=sb,
        beta=0.5,
    )
    got = AirlObjective().loss(batch)
    torch.testing.assert_close(got.loss, airl_loss(2 * expert + eb, 2 * sample + sb, el, sl).loss)
    assert float(got.metrics["expert_reward"]) == pytest.approx(float(expert.mean()))  # f, as it is exported
    with pytest.raises(ValueError, match="airl needs expert_logprobs"):
        AirlObjective().loss(replace(batch, expert_logprobs=None))


def test_errors_name_the_tensor() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=re.escape("sample_logprobs has shape (1,); expected that of sample_rewards")):
        airl_loss(one, two, one, one)
    with pytest.raises(ValueError, match=re.escape("expert_rewards[0] is inf; every reward must be finite")):
        airl_loss(one + torch.inf, two, one, two)
    with pytest.raises(ValueError, match="form = 'pair', expected 'sequence' or 'token'"):
        AirlObjective(form="pair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gamma = 2\.0"):
        AirlObjective(gamma=2.0)


# The token form


def tokens(seed: int, lengths: list[int], *, width: int = 6, prompt: int = 1) -> TokenTerms:
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(width)
    mask = torch.stack([(position >= prompt) & (position < prompt + length) for length in lengths])

    def draw() -> Tensor:
        return torch.randn(len(lengths), width, dtype=torch.float64, generator=generator)

    return TokenTerms(rewards=draw(), mask=mask, logprobs=draw(), potentials=draw())


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_token_loss_one_token_at_a_time(gamma: float) -> None:
    sides, logits = [tokens(0, [4, 2, 5]), tokens(1, [1, 3])], []
    for side in sides:
        z = []
        for row in range(len(side.mask)):
            places = side.mask[row].nonzero()[:, 0].tolist()
            for i, t in enumerate(places):
                assert side.potentials is not None
                following = side.potentials[row, places[i + 1]] if i + 1 < len(places) else 0.0
                shaping = gamma * following - side.potentials[row, t]
                z.append(side.rewards[row, t] + shaping - side.logprobs[row, t])
        logits.append(torch.stack(z))
    want = softplus(-logits[0]).mean() + softplus(logits[1]).mean()
    torch.testing.assert_close(airl_token_loss(*sides, gamma=gamma).loss, want)


def test_undiscounted_shaping_telescopes_to_the_first_potential() -> None:
    side = tokens(2, [4, 1, 5])
    assert side.potentials is not None
    shaped = shaped_token_rewards(side, 1.0).sum(1)
    plain = torch.where(side.mask, side.rewards, 0.0).sum(1)
    torch.testing.assert_close(shaped, plain - side.potentials[:, 1])


def test_what_is_outside_the_mask_is_not_read_and_gets_no_gradient() -> None:
    side, other = tokens(3, [4, 2]), tokens(4, [3])
    want = airl_token_loss(side, other).loss
    dirty = {
        name: torch.where(side.mask, getattr(side, name), torch.nan).requires_grad_()
        for name in ("rewards", "logprobs", "potentials")
    }
    loss = airl_token_loss(replace(side, **dirty), other).loss
    assert torch.equal(loss, want)
    loss.backward()
    for name in ("rewards", "potentials"):
        gradient = dirty[name].grad
        assert gradient is not None
        assert torch.equal(gradient[~side.mask], torch.zeros(int((~side.mask).sum()), dtype=torch.float64))
        assert bool((gradient[side.mask] != 0).any())
    assert dirty["logprobs"].grad is None


def test_the_token_objective_asks_for_tokens_and_shapes_that_agree() -> None:
    batch = RewardBatch(expert_rewards=torch.zeros(1), sample_rewards=torch.zeros(1))
    objective = AirlObjective(form="token")
    assert objective.needs == {"expert_tokens", "sample_tokens"}
    with pytest.raises(ValueError, match="form='token' needs expert_tokens and sample_tokens"):
        objective.loss(batch)
    full = replace(batch, expert_tokens=tokens(0, [2]), sample_tokens=tokens(1, [3]))
    assert torch.isfinite(objective.loss(full).loss)
    bad = replace(tokens(0, [2]), logprobs=torch.zeros(1, 5))
    with pytest.raises(
        ValueError, match=re.escape("expert tokens: logprobs has shape (1, 5); expected that of rewards")
    ):
        airl_token_loss(bad, tokens(1, [3]))
    with pytest.raises(ValueError, match=re.escape("sample_token_logits has shape (0,)")):
        airl_token_loss(tokens(0, [2]), tokens(1, [0]))
