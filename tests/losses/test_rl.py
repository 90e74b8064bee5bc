"""losses.compute_rl_loss: exact expected gradients on the toy language, batches, padding, statistics, errors."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irlfast.eval import toy
from irlfast.losses import compute_rl_loss, response_logprobs
from irlfast.losses.rl import MODES

IDS = toy.all_input_ids()
REAL = IDS != toy.PAD
REWARDS = toy.true_rewards()
SUM = "seq_mean_token_sum"
PATHS = ["hidden", "logits"]
MakeLM = Callable[[str], nn.Module]


def random_policy(seed: int) -> toy.ToyPolicy:
    policy = toy.ToyPolicy(dtype=torch.float64)
    with torch.no_grad():
        policy.table.copy_(torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(seed)))
    return policy


def expected_gradient(policy: toy.ToyPolicy, rewards: Tensor, **options: Any) -> Tensor:
    """E[grad loss] over y ~ policy, exactly: each of the 121 strings on its own, weighted with its probability."""
    total = torch.zeros_like(policy.table)
    old = options.pop("old_logprobs", None)
    for row, p in enumerate(toy.log_probs(policy).detach().exp()):
        if old is not None:
            options["old_logprobs"] = old[row : row + 1]
        loss = compute_rl_loss(
            policy,
            IDS[row],
            1,
            rewards[row : row + 1],
            attention_mask=REAL[row],
            normalize_adv=False,
            **{"aggregation": SUM} | options,
        ).loss
        total += p * torch.autograd.grad(loss, policy.table)[0]
    return total


def gradient(value: Tensor, policy: toy.ToyPolicy) -> Tensor:
    return torch.autograd.grad(value, policy.table)[0]


@pytest.mark.parametrize("mode", ["reinforce", "ppo"])
def test_expected_gradient_is_that_of_the_expected_reward(mode: str) -> None:
    policy = random_policy(0)
    log_p = toy.log_probs(policy)
    want = gradient(-(log_p.exp() * REWARDS).sum(), policy)
    old = response_logprobs(policy, IDS, 1, attention_mask=REAL)
    got = expected_gradient(policy, REWARDS, mode=mode, old_logprobs=old)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_expected_gradient_of_token_mode_with_rewards_to_go() -> None:
    """Each token pays its index plus its id; an advantage is what is paid from its token on."""
    policy = random_policy(1)
    paid = torch.where(REAL, torch.arange(6) + 0.5 * IDS, 0.0).double()
    paid[:, 0] = 0
    log_p = toy.log_probs(policy)
    want = gradient(-(log_p.exp() * paid.sum(dim=1)).sum(), policy)
    to_go = paid.flip(1).cumsum(1).flip(1)
    got = expected_gradient(policy, to_go, mode="token")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_kl_term_had_expected_gradient_zero() -> None:
    """The mean log-ratio (k1), added as a loss, is noise. Ours has the exact gradient of KL(pi(y|x) || ref(y|x))."""
    policy, reference = random_policy(2), random_policy(3)
    log_p, log_q = toy.log_probs(policy), toy.log_probs(reference).detach()
    (want,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), policy.table, retain_graph=True)
    got = expected_gradient(policy, torch.zeros(toy.NUM_STRINGS), mode="kl", ref_model=reference, kl_coef=1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    k1 = gradient((log_p.exp().detach() * (log_p - log_q)).sum(), policy)
    assert float(k1.abs().max()) < 1e-12
    assert float(want.abs().max()) > 1e-2


def test_expected_gradient_of_kl_mode_is_that_of_reward_and_divergence() -> None:
    policy, reference = random_policy(4), random_policy(5)
    log_p, log_q = toy.log_probs(policy), toy.log_probs(reference).detach()
    want = gradient((log_p.exp() * (0.3 * (log_p - log_q) - REWARDS)).sum(), policy)
    got = expected_gradient(policy, REWARDS, mode="kl", ref_model=reference, kl_coef=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_statistics_are_the_exact_means_over_the_language() -> None:
    """Over samples in proportion to their probability: here a policy under which 3 strings can occur."""
    policy = toy.ToyPolicy(dtype=torch.float64)
    with torch.no_grad():  # EOS with probability 1/2 at the root, else token 0 and then EOS, or 0 0 EOS ...
        policy.table.fill_(-torch.inf)
        policy.table[:, 3] = 0.0
        policy.table[0, 0] = 0.0
    reference = random_policy(6)
    ids = torch.tensor([[toy.BOS, toy.EOS, toy.PAD], [toy.BOS, 0, toy.EOS]])
    _, stats = compute_rl_loss(
        policy, ids, 1, [1.0, 3.0], mode="kl", ref_model=reference, attention_mask=ids != toy.PAD
    )
    log_q = toy.log_probs(reference)[[0, 1]].detach()
    assert float(stats["mean_reward"]) == 2.0
    assert float(stats["mean_seq_logprob"]) == pytest.approx(-math.log(2))
    assert float(stats["mean_resp_logprob"]) == pytest.approx(-2 * math.log(2) / 3)
    assert float(stats["entropy"]) == pytest.approx(2 * math.log(2) / 3)  # ln 2 at the root in both rows, else 0
    assert float(stats["kl_mean"]) == pytest.approx(float((-math.log(2) - log_q).mean()))


# A batch of a real architecture: responses of 3, 1, 4 and 0 tokens, EOS (2) included.
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12]]
RESPONSES = [[20, 21, 2], [2], [22, 23, 24, 25], []]
LENGTHS = [len(prompt) for prompt in PROMPTS]
SCORES = torch.tensor([1.0, -0.5, 2.0, 100.0])


def padded(side: str, width: int = 7) -> tuple[Tensor, Tensor]:
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    fill = [[0] * (width - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(f)
        for f, row in zip(fill, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def per_token(values: float = 0.1) -> Tensor:
    """[B, R] numbers over the responses, NaN where there is no token."""
    longest = max(map(len, RESPONSES))
    rows = [[values * (i + 1) * (j - 1.5) for j in range(len(r))] for i, r in enumerate(RESPONSES)]
    return torch.tensor([row + [math.nan] * (longest - len(row)) for row in rows])


def arguments(make_lm: MakeLM, mode: str, family: str = "llama") -> dict[str, Any]:
    """The model, a reference that differs, old log-probs that differ from both, rewards of the mode's shape."""
    model, reference = make_lm(family), make_lm(family)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    options: dict[str, Any] = {"rewards": per_token(1.0) if mode == "token" else SCORES, "ent_coef": 0.05}
    if mode == "kl":
        options["ref_model"] = reference
    if mode == "ppo":
        ids, mask = padded("right")
        old = response_logprobs(model, ids, LENGTHS, attention_mask=mask)
        options["old_logprobs"] = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
    return {"model": model, "prompt_len": LENGTHS, "mode": mode, **options}


def result(
    given: dict[str, Any], side: str = "right", **changes: Any
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    ids, mask = padded(side)
    call = {"enc_input_ids": ids, "attention_mask": mask} | given | changes
    call["model"].zero_grad()
    loss, stats = compute_rl_loss(**call)
    loss.backward()
    return loss.detach(), stats, [p.grad.clone() for p in call["model"].parameters() if p.grad is not None]


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_the_hidden_path_and_the_logits_give_the_same(make_lm: MakeLM, mode: str) -> None:
    given = arguments(make_lm, mode, "gemma2")
    close(result(given, path="hidden"), result(given, path="logits"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding_equals_right_padding(make_lm: MakeLM, mode: str, family: str) -> None:
    given = arguments(make_lm, mode, family)
    right = result(given)
    if mode == "ppo":  # [B, T] follows its tokens; [B, R] need not
        _, mask = padded("right")
        start = (mask.sum(1) - 7).tolist()
        given["old_logprobs"] = torch.stack([row.roll(-s) for row, s in zip(given["old_logprobs"], start, strict=True)])
    close(result(given, "left"), right)


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_is_the_mean_of_its_rows(make_lm: MakeLM, mode: str) -> None:
    """Each row alone, without padding; the row without a response counts nowhere."""
    given = arguments(make_lm, mode) | {"normalize_adv": False, "aggregation": SUM}
    loss, stats, grads = result(given)
    rows = []
    for i in range(3):
        ids = torch.tensor(PROMPTS[i] + RESPONSES[i])
        change = {"enc_input_ids": ids, "attention_mask": None, "prompt_len": LENGTHS[i]}
        size = len(RESPONSES[i])
        change["rewards"] = given["rewards"][i, :size] if mode == "token" else float(given["rewards"][i])
        if mode == "ppo":
            change["old_logprobs"] = given["old_logprobs"][i, : len(ids)]
        rows.append(result(given, **change))
    close(loss, torch.stack([row[0] for row in rows]).mean())
    close(grads, [torch.stack(parts).mean(0) for parts in zip(*(row[2] for row in rows), strict=True)])
    for name in ("mean_reward", "mean_seq_logprob") + (("kl_mean",) if mode == "kl" else ()):
        close(stats[name], torch.stack([row[1][name] for row in rows]).mean())
    tokens = torch.tensor([len(r) for r in RESPONSES[:3]], dtype=torch.float32)
    for name in ("mean_resp_logprob", "entropy") + (("ratio_mean", "clip_fraction") if mode == "ppo" else ()):
        close(stats[name], (torch.stack([row[1][name] for row in rows]) * tokens).sum() / tokens.sum())


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_batch(make_lm: MakeLM, mode: str) -> None:
    """With the whole batch's count: 3 non-empty responses, or their 8 tokens."""
    given = arguments(make_lm, mode) | {"normalize_adv": False}
    whole, _, want = result(given)
    ids, mask = padded("right")
    total, grads = 0.0, [torch.zeros_like(g) for g in want]
    for rows in (slice(0, 1), slice(1, 4)):
        longest = max(map(len, RESPONSES[rows]))
        part = {
            "enc_input_ids": ids[rows],
            "attention_mask": mask[rows],
            "prompt_len": LENGTHS[rows],
            "rewards": given["rewards"][rows, :longest] if mode == "token" else given["rewards"][rows],
            "denominator": 8 if mode == "ppo" else 3,
        }
        if mode == "ppo":
            part["old_logprobs"] = given["old_logprobs"][rows]
        loss, _, parts = result(given, **part)
        total += float(loss)
        grads = [a + b for a, b in zip(grads, parts, strict=True)]
    assert total == pytest.approx(float(whole), rel=1e-5)
    close(grads, want)


@pytest.mark.parametrize("mode", MODES)
def test_one_sample_was_whitened_to_nan(make_lm: MakeLM, mode: str) -> None:
    """The deviation of one reward is 0 / 0. Its advantage is 0, and it says so."""
    ids = torch.tensor([5, 6, 7, 2])
    given = arguments(make_lm, mode) | {"ent_coef": 0.0, "kl_coef": 0.0}
    given |= {"enc_input_ids": ids, "attention_mask": None, "prompt_len": 3, "old_logprobs": torch.full((1,), -1.0)}
    given["rewards"] = [1.0]
    with pytest.warns(UserWarning, match="normalize_adv=True on a single reward gives advantage 0"):
        loss, stats, grads = result(given)
    assert float(loss) == 0.0
    assert all((g == 0).all() for g in grads)
    assert all(bool(value.isfinite()) for value in stats.values())
    loss, _, grads = result(given, normalize_adv=False)
    assert bool(loss.isfinite())
    assert any((g != 0).any() for g in grads)


def test_token_mode_raised_always(make_lm: MakeLM) -> None:
    """By hand from the model's own log-softmax, whitened over the 8 response tokens."""
    given = arguments(make_lm, "token") | {"ent_coef": 0.0}
    loss, stats, _ = result(given)
    ids, mask = padded("right")
    with torch.no_grad():
        log_p = given["model"](input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    rewards = [[float(x) for x in row[: len(r)]] for row, r in zip(per_token(1.0), RESPONSES, strict=True)]
    flat = torch.tensor([x for row in rewards for x in row])
    want = 0.0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for j, token in enumerate(response):
            advantage = (rewards[i][j] - flat.mean()) / flat.std()
            want -= float(advantage * log_p[i, len(prompt) + j - 1, token]) / 3
    assert float(loss) == pytest.approx(want, rel=1e-4)
    assert float(stats["mean_reward"]) == pytest.approx(float(flat.sum()) / 3)
    by_token = torch.full(ids.shape, torch.nan)
    for i, row in enumerate(rewards):
        by_token[i, LENGTHS[i] : LENGTHS[i] + len(row)] = torch.tensor(row)
    close(result(given, rewards=by_token), result(given))


def test_one_prompt_length_served_all_rows(make_lm: MakeLM) -> None:
    given = arguments(make_lm, "reinforce")
    _, stats, _ = result(given)
    ids, mask = padded("right")
    with torch.no_grad():
        log_p = given["model"](input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    sums = [
        sum(float(log_p[i, len(p) + j - 1, token]) for j, token in enumerate(r))
        for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    assert float(stats["mean_seq_logprob"]) == pytest.approx(sum(sums) / 3, rel=1e-5)
    assert float(stats["mean_resp_logprob"]) == pytest.approx(sum(sums) / 8, rel=1e-5)
    wrong = result(given, prompt_len=1)[1]["mean_resp_logprob"]
    assert abs(float(wrong) - sum(sums) / 8) > 0.05


def test_entropy_counted_prompt_and_padding(make_lm: MakeLM) -> None:
    given = arguments(make_lm, "reinforce") | {"rewards": torch.zeros(4), "ent_coef": 1.0}
    ids, mask = padded("right")
    positions = [
        (i, len(p) + j - 1) for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)) for j in range(len(r))
    ]
    logits = given["model"](input_ids=ids, attention_mask=mask).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    own = torch.stack([entropy[i, t] for i, t in positions])
    for aggregation, count in (("token_mean", 8), (SUM, 3)):
        loss, stats, grads = result(given, aggregation=aggregation)
        close(stats["entropy"], own.detach().mean())
        close(loss, -own.detach().sum() / count)
        want = torch.autograd.grad(-own.sum() / count, [*given["model"].parameters()], retain_graph=True)
        close(grads, list(want))
    assert abs(float((entropy.mean() - own.mean()).detach())) > 0.02


def test_ppo_terms_by_hand(make_lm: MakeLM) -> None:
    model = make_lm("llama")
    ids = torch.tensor([[5, 20, 21, 2], [5, 22, 23, 2]])
    new = response_logprobs(model, ids, 1)[:, 1:]
    ratios = torch.tensor([[1.1, 1.5, 0.5], [1.1, 1.5, 0.5]])
    loss, stats = compute_rl_loss(
        model, ids, 1, [2.0, -2.0], mode="ppo", old_logprobs=new - ratios.log(), normalize_adv=False, cliprange=0.2
    )
    positive = -2 * (1.1 + 1.2 + 0.5)
    negative = 2 * (1.1 + 1.5 + 0.8)
    assert float(loss.detach()) == pytest.approx((positive + negative) / 6, rel=1e-4)
    assert float(stats["clip_fraction"]) == pytest.approx(2 / 6)
    assert float(stats["ratio_mean"]) == pytest.approx((1.1 + 1.5 + 0.5) / 3, rel=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_ratio_is_exactly_one_on_the_first_step(make_lm: MakeLM, path: str) -> None:
    given = arguments(make_lm, "ppo")
    ids, mask = padded("right")
    old = response_logprobs(given["model"], ids, LENGTHS, attention_mask=mask, path=path)
    assert not old.requires_grad
    assert old.shape == ids.shape
    _, stats, _ = result(given, old_logprobs=old, path=path)
    assert float(stats["ratio_mean"]) == 1.0
    assert float(stats["clip_fraction"]) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_the_model_alone(make_lm: MakeLM, mode: str) -> None:
    given = arguments(make_lm, mode)
    given["ref_model"] = reference = make_lm("gpt2")
    rewards = given["rewards"].clone().requires_grad_()
    old = torch.full((4, 7), -1.0, requires_grad=True)
    _, stats, grads = result(given, rewards=rewards, old_logprobs=old)
    assert any((g != 0).any() for g in grads)
    assert rewards.grad is None
    assert old.grad is None
    assert all(p.grad is None for p in reference.parameters())
    keys = {"mean_reward", "mean_seq_logprob", "mean_resp_logprob", "entropy", "kl_mean", "ratio_mean"}
    assert stats.keys() == keys | ({"clip_fraction"} if mode == "ppo" else set())
    assert all(value.dim() == 0 and not value.requires_grad and bool(value.isfinite()) for value in stats.values())


def test_reference_and_old_logprobs_only_report_outside_their_modes(make_lm: MakeLM) -> None:
    given = arguments(make_lm, "reinforce")
    ids, mask = padded("right")
    old = response_logprobs(given["model"], ids, LENGTHS, attention_mask=mask) - 0.1
    plain = result(given)
    more = result(given, ref_model=make_lm("gpt2"), old_logprobs=old, kl_coef=9.0)
    assert torch.equal(plain[0], more[0])
    assert float(more[1]["ratio_mean"]) == pytest.approx(math.exp(0.1), rel=1e-4)
    assert "kl_mean" not in plain[1]
    assert "ratio_mean" not in plain[1]


def test_kl_of_a_model_to_itself_is_zero(make_lm: MakeLM) -> None:
    given = arguments(make_lm, "kl")
    given["ref_model"] = copy.deepcopy(given["model"])
    same = result(given, kl_coef=5.0)
    assert float(same[1]["kl_mean"]) == 0.0
    close(same[::2], result(given, mode="reinforce")[::2], 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast(make_lm: MakeLM, mode: str) -> None:
    given = arguments(make_lm, mode)
    want = result(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, mask = padded("right")
        loss, stats = compute_rl_loss(enc_input_ids=ids, attention_mask=mask, **given)
    given["model"].zero_grad()
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(want[0]), abs=0.15)
    got = torch.cat([p.grad.flatten() for p in given["model"].parameters()])
    exact = torch.cat([g.flatten() for g in want[2]])
    assert float((got - exact).norm() / exact.norm()) < 0.1
    assert float(stats["entropy"]) == pytest.approx(float(want[1]["entropy"]), abs=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_a_response_has_loss_and_gradient_zero(make_lm: MakeLM, mode: str) -> None:
    given = arguments(make_lm, mode)
    ids = torch.tensor([[5, 6, 0], [0, 0, 0]])
    change = {
        "enc_input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "prompt_len": 2,
        "rewards": torch.full((2, 3) if mode == "token" else (2,), torch.nan),
        "old_logprobs": torch.full((2, 3), torch.nan) if mode == "ppo" else None,
    }
    loss, stats, grads = result(given, **change)
    assert float(loss) == 0.0
    assert all((g == 0).all() for g in grads)
    assert all(float(value) == 0.0 for value in stats.values())


def test_normalisation_is_over_responses_that_exist(make_lm: MakeLM) -> None:
    """The row without a response has reward 100, which must not move the others' mean."""
    given = arguments(make_lm, "reinforce") | {"ent_coef": 0.0}
    scores = (SCORES[:3] - SCORES[:3].mean()) / SCORES[:3].std()
    by_hand = result(given, rewards=torch.cat([scores, torch.tensor([torch.nan])]), normalize_adv=False)
    close(result(given)[0], by_hand[0])
    assert float(result(given)[1]["mean_reward"]) == pytest.approx(float(SCORES[:3].mean()))


def test_equal_rewards_give_no_gradient_and_no_warning(make_lm: MakeLM) -> None:
    given = arguments(make_lm, "reinforce") | {"ent_coef": 0.0, "rewards": [3, 3, 3, 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, _, grads = result(given)
    assert float(loss) == 0.0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("mode", MODES)
def test_a_few_steps_raise_the_reward(mode: str) -> None:
    """From samples alone: token 0 is worth 1, on the toy language."""
    policy, reference = toy.ToyPolicy(), toy.ToyPolicy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    worth = (IDS == 0).float()

    def mean_worth() -> float:
        return float((toy.log_probs(policy).exp().detach() * worth.sum(1)).sum())

    before = mean_worth()
    for step in range(20):
        drawn = toy.sample_strings(64, seed=step, log_probs=toy.log_probs(policy))
        ids, rewards = IDS[drawn], worth[drawn] if mode == "token" else worth[drawn].sum(1)
        old = response_logprobs(policy, ids, 1, pad_token_id=toy.PAD) if mode == "ppo" else None
        for _ in range(2 if mode == "ppo" else 1):
            loss, _ = compute_rl_loss(policy, ids, 1, rewards, mode, reference, old, kl_coef=0.01, pad_token_id=toy.PAD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert mean_worth() > before + 0.5


def test_the_arguments_stand_in_the_order_that_callers_rely_on() -> None:
    parameters = inspect.signature(compute_rl_loss).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("model", inspect.Parameter.empty),
        ("enc_input_ids", inspect.Parameter.empty),
        ("prompt_len", inspect.Parameter.empty),
        ("rewards", inspect.Parameter.empty),
        ("mode", "reinforce"),
        ("ref_model", None),
        ("old_logprobs", None),
        ("kl_coef", 0.1),
        ("cliprange", 0.2),
        ("ent_coef", 0.0),
        ("normalize_adv", True),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "grpo"}, r"mode is 'grpo'; expected one of \('reinforce', 'kl', 'ppo', 'token'\)"),
        ({"mode": "kl"}, "mode 'kl' needs ref_model"),
        (
            {"mode": "ppo"},
            "mode 'ppo' needs old_logprobs, which was not given: compute them with losses.response_logprobs",
        ),
        ({"mode": "ppo", "old_logprobs": torch.zeros(121, 5)}, None),
        (
            {"mode": "ppo", "old_logprobs": torch.zeros(121, 4)},
            r"old_logprobs has shape \(121, 4\); expected \(121, 6\)",
        ),
        ({"rewards": torch.zeros(3)}, r"rewards has shape \(3,\); mode 'reinforce' expects \(121,\), one a response"),
        ({"rewards": torch.zeros(121, 6)}, "one a token use mode 'token'"),
        ({"rewards": 1.0}, r"rewards has shape \(\); mode"),
        ({"mode": "token"}, r"rewards of mode 'token' has shape \(121,\); expected \(121, 6\), entry t at token t, or"),
        ({"rewards": torch.full((121,), torch.inf)}, r"rewards\[0\] is inf; every reward must be finite"),
        ({"prompt_len": 6}, "prompt_len of row 0 is 6; expected at least 1"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1; expected at least 0"),
        ({"cliprange": 2.0}, r"cliprange is 2.0; expected a number in \[0, 1\]"),
        ({"aggregation": "mean"}, "aggregation is 'mean'"),
        ({"pad_token_id": toy.EOS, "attention_mask": None}, "pad_token_id = 3 also ends responses"),
        ({"path": "hidden"}, "ToyPolicy has no get_output_embeddings"),
    ],
)
def test_errors(options: dict[str, Any], message: str | None) -> None:
    call: dict[str, Any] = {"enc_input_ids": IDS, "prompt_len": 1, "rewards": REWARDS, "attention_mask": REAL} | options
    if message is None:
        compute_rl_loss(toy.ToyPolicy(), **call)
        return
    with pytest.raises((ValueError, TypeError), match=message):
        compute_rl_loss(toy.ToyPolicy(), **call)
