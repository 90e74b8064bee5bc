"""The toy language: its published constants, and ToyPolicy as an exact language model."""

import math

import pytest
import torch

from irlfast.eval import toy


def test_constants_of_the_language() -> None:
    rewards, log_p = toy.true_rewards(), toy.expert_log_probs()
    assert len(set(toy.all_strings())) == toy.NUM_STRINGS == 121
    assert float(rewards.logsumexp(0)) == pytest.approx(5.2524, abs=5e-5)
    assert float(-(log_p.exp() * log_p).sum()) == pytest.approx(4.2936, abs=5e-5)
    assert float(log_p.exp() @ rewards) == pytest.approx(0.9588, abs=5e-5)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ((), [0, 0, 0, 0, 0]),
        ((2,), [0, 0, 0, 1, 1]),
        ((0, 1, 0, 1), [2, 2, 2, 4, 0]),
        ((2, 0, 1, 2), [1, 1, 1, 4, 1]),
        ((0, 2, 1), [1, 1, 0, 3, 0]),
    ],
)
def test_features_by_hand(body: tuple[int, ...], expected: list[float]) -> None:
    row = toy.all_strings().index((*body, toy.EOS))
    assert toy.features()[row].tolist() == expected
    assert float(toy.true_rewards()[row]) == pytest.approx(
        sum(w * x for w, x in zip(toy.TRUE_WEIGHTS, expected, strict=True))
    )


def test_strings_are_numbered_as_a_heap() -> None:
    strings = toy.all_strings()
    for i in range(toy.NUM_OPEN_PREFIXES):
        for t in range(3):
            assert strings[3 * i + 1 + t] == (*strings[i][:-1], t, toy.EOS)


def test_samples_follow_the_expert_and_the_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = toy.sample_strings(50_000, seed=3)
    assert torch.equal(drawn, toy.sample_strings(50_000, seed=3))
    assert not torch.equal(drawn, toy.sample_strings(50_000, seed=4))
    assert torch.equal(state, torch.get_rng_state())
    expected = toy.expert_log_probs().exp() * 50_000
    chi_square = float(((torch.bincount(drawn, minlength=121) - expected) ** 2 / expected).sum())
    assert chi_square < 120 + 4 * math.sqrt(240)  # mean 120, variance 240


def test_read_prefixes_finds_every_prefix_of_every_string() -> None:
    strings = toy.all_strings()
    bodies = {s[:-1]: i for i, s in enumerate(strings)}
    prefix, ended = toy.read_prefixes(toy.all_input_ids())
    for row, (*body, _) in enumerate(strings):
        for position in range(6):
            assert int(prefix[row, position]) == bodies[tuple(body[:position])]
            assert bool(ended[row, position]) == (position > len(body))


def test_padding_on_either_side_and_masked_garbage_change_nothing() -> None:
    plain = torch.tensor([[toy.BOS, 0, 1, toy.EOS]])
    left = torch.tensor([[toy.PAD, toy.PAD, toy.BOS, 0, 1, toy.EOS]])
    garbage = torch.tensor([[2, 99, toy.BOS, 0, 1, toy.EOS, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    expected = toy.string_indices(plain)
    assert torch.equal(toy.string_indices(left), expected)
    assert torch.equal(toy.string_indices(garbage, mask), expected)
    policy = toy.ToyPolicy()
    torch.nn.init.normal_(policy.table)
    want = policy(plain).logits[:, :3]
    assert torch.equal(policy(left, attention_mask=left != toy.PAD).logits[:, 2:5], want)
    assert torch.equal(policy(garbage, attention_mask=mask).logits[:, 2:5], want)


def test_what_follows_eos_belongs_to_no_string() -> None:
    prefix, ended = toy.read_prefixes(torch.tensor([[toy.BOS, 1, toy.EOS, 0, 2, 2, 2, 2]]))
    assert prefix.tolist() == [[0, 2, 2, 2, 2, 2, 2, 2]]
    assert ended.tolist() == [[False, False, True, True, True, True, True, True]]


def test_new_policy_is_uniform_over_the_four_tokens() -> None:
    log_q = toy.log_probs(toy.ToyPolicy(dtype=torch.float64)).detach()
    expected = torch.tensor([min(len(s), 4) * math.log(0.25) for s in toy.all_strings()], dtype=torch.float64)
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-12)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_any_policy_sums_to_one_and_can_be_differentiated() -> None:
    torch.manual_seed(0)
    policy = toy.ToyPolicy(dtype=torch.float64)
    torch.nn.init.normal_(policy.table, std=3.0)
    total = toy.log_probs(policy).exp().sum()
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(total, policy.table)
    assert float(gradient.abs().max()) < 1e-12  # the total is 1 whatever the table
    (gradient,) = torch.autograd.grad(toy.log_probs(policy)[120], policy.table)
    assert torch.isfinite(gradient).all()
    assert int((gradient.abs().sum(dim=1) > 0).sum()) == 4  # the four prefixes on the way to "2222"


def test_table_can_represent_the_expert() -> None:
    """Fit by exact maximum likelihood: the KL to the expert goes to zero, so no string is out of reach."""
    target = toy.expert_log_probs()
    policy = toy.ToyPolicy(dtype=torch.float64)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.2)
    for _ in range(200):
        optimiser.zero_grad()
        loss = (target.exp() * (target - toy.log_probs(policy))).sum()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 1e-4


def test_policy_of_log_probs_has_them() -> None:
    expert = toy.expert_log_probs()
    torch.testing.assert_close(toy.log_probs(toy.policy_of(expert, dtype=torch.float64)).detach(), expert)
    torch.manual_seed(0)
    random = torch.randn(121, dtype=torch.float64) * 3
    got = toy.log_probs(toy.policy_of(random, dtype=torch.float64)).detach()
    torch.testing.assert_close(got, random.log_softmax(0))
    assert toy.policy_of(expert).table.dtype == torch.float32
    with pytest.raises(ValueError, match=r"log_probs has shape \(3,\); expected \[121\]"):
        toy.policy_of(torch.zeros(3))


def test_end_of_string_is_forced_and_special_tokens_are_never_sampled() -> None:
    policy = toy.ToyPolicy()
    torch.nn.init.normal_(policy.table)
    full = torch.tensor([[toy.BOS, 2, 2, 2, 2]])
    probabilities = policy(full).logits.softmax(-1)[0]
    assert probabilities[-1].tolist() == [0, 0, 0, 1, 0, 0]
    assert torch.equal(probabilities[:, [toy.BOS, toy.PAD]], torch.zeros(5, 2))
    ended = torch.tensor([[toy.BOS, 1, toy.EOS, toy.PAD]])
    assert policy(ended).logits.softmax(-1)[0, 2:].tolist() == [[0, 0, 0, 1, 0, 0]] * 2


def test_hidden_states_are_the_features_of_the_prefix() -> None:
    ids = toy.all_input_ids()
    hidden = toy.ToyPolicy()(ids, output_hidden_states=True, use_cache=True).hidden_states
    assert hidden is not None
    assert torch.equal(hidden[-1], toy.ToyFeatures()(ids))
    last = (ids != toy.PAD).sum(dim=1) - 1
    assert torch.equal(hidden[-1][torch.arange(121), last].double(), toy.features())
    assert torch.equal(hidden[-1][:, 0], torch.zeros(121, 5))
    assert toy.ToyPolicy()(ids).hidden_states is None
    assert toy.ToyPolicy()(ids).past_key_values is None


def test_logits_to_keep_returns_the_last_positions() -> None:
    policy = toy.ToyPolicy()
    ids = toy.all_input_ids()
    assert torch.equal(policy(ids, logits_to_keep=2).logits, policy(ids).logits[:, -2:])


def test_string_indices_invert_all_input_ids() -> None:
    assert torch.equal(toy.string_indices(toy.all_input_ids()), torch.arange(121))


def test_recovery_of_the_truth_is_perfect_up_to_shift_and_of_a_constant_is_none() -> None:
    pearson, tv = toy.reward_recovery(toy.true_rewards() + 7)
    assert pearson == pytest.approx(1)
    assert tv == pytest.approx(0, abs=1e-12)
    scaled = toy.reward_recovery(2 * toy.true_rewards())
    assert scaled.pearson == pytest.approx(1)
    assert scaled.tv > 0.2
    assert toy.reward_recovery(2 * toy.true_rewards(), beta=2.0).tv == pytest.approx(0, abs=1e-12)
    constant = toy.reward_recovery(torch.full((121,), 0.1))
    assert constant.pearson == 0
    assert constant.tv == pytest.approx(0.5 * float((toy.expert_log_probs().exp() - 1 / 121).abs().sum()))


def test_errors_name_the_value_and_what_was_expected() -> None:
    policy = toy.ToyPolicy()
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] = 6 is outside \[0, 6\)"):
        policy(torch.tensor([[toy.BOS, 6]]))
    with pytest.raises(ValueError, match=r"input_ids\[1\] has 5 body tokens; the language allows 4"):
        policy(torch.tensor([[toy.BOS, 0, 0, 0, 0, toy.EOS], [toy.BOS, 0, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="keeps no cache"):
        policy(torch.tensor([[toy.BOS]]), past_key_values=object())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\); expected that of input_ids, \(1, 1\)"):
        policy(torch.tensor([[toy.BOS]]), attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"input_ids\[0\] has no EOS"):
        toy.string_indices(torch.tensor([[toy.BOS, 1]]))
    with pytest.raises(ValueError, match=r"learned_rewards has shape \(3,\); expected \[121\]"):
        toy.reward_recovery(torch.zeros(3))
    with pytest.raises(ValueError, match=r"learned_rewards\[5\] is nan"):
        toy.reward_recovery(torch.where(torch.arange(121) == 5, torch.nan, 0.0))
    with pytest.raises(ValueError, match="count is 0"):
        toy.sample_strings(0, seed=0)
