"""losses.iq_learn_loss and linear_iq_learn_loss: values, gradients, masks, truncation, the KL, errors.

The regression tests named "port" are for mistakes of an earlier port of this method.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast import ops
from irlfast.losses import iq_learn_loss, iq_learn_rewards, linear_iq_learn_loss, sampled_kl

VOCAB = 7
Batch = dict[str, Any]


def batch(seed: int, *, rows: int = 5, width: int = 9, dtype: torch.dtype = torch.float64) -> Batch:
    """Logits, labels, prompts of 0 to 3 tokens, responses of 0 to 5, padding on the right; about half are cut off."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 4, (rows,), generator=generator)
    length = torch.randint(0, 6, (rows,), generator=generator)
    column = torch.arange(width)
    return {
        "logits": 3 * torch.randn(rows, width, VOCAB, generator=generator, dtype=torch.float64).to(dtype),
        "labels": torch.randint(VOCAB, (rows, width), generator=generator),
        "mask": (column >= prompt[:, None]) & (column < (prompt + length)[:, None]),
        "ended": torch.rand(rows, generator=generator) < 0.5,
    }


def statistics(data: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logits = data["logits"]
    return logits.gather(-1, data["labels"][..., None])[..., 0], (logits / temperature).logsumexp(-1)


def loss_of(data: Batch, **options: Any) -> Tensor:
    q, lse = statistics(data, options.get("temperature", 1.0))
    return iq_learn_loss(q, lse, data["mask"], ended=data["ended"], **options).loss


def reference(
    data: Batch, *, gamma: float, lambda_td: float, temperature: float, truncated: str, likelihood: float = 1.0
) -> Tensor:
    """The definition, token by token, in Python."""
    terms, tokens = [], 0
    for row in range(len(data["labels"])):
        places = data["mask"][row].nonzero()[:, 0].tolist()
        tokens += len(places)
        for t in places:
            logits = data["logits"][row]
            q = logits[t, data["labels"][row, t]]
            value = temperature * torch.logsumexp(logits[t] / temperature, dim=0)
            terms.append(likelihood * (value - q))
            last = t == places[-1]
            if last and not data["ended"][row] and truncated == "drop":
                continue
            following = temperature * torch.logsumexp(logits[t + 1] / temperature, dim=0)
            reward = q - gamma * (0.0 if last and data["ended"][row] else following)
            terms.append(lambda_td * reward**2)
    return torch.stack(terms).sum() / tokens if terms else torch.zeros((), dtype=torch.float64)


def test_value_by_hand() -> None:
    """Two tokens of q 1 and 2, values 3 and 5, then EOS: rewards 1 - .5 x 5 and 2."""
    q, lse = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    result = iq_learn_loss(q, lse, torch.ones(1, 2), ended=torch.tensor([True]), gamma=0.5, lambda_td=0.1)
    assert float(result.loss) == pytest.approx((2 + 3) / 2 + 0.1 * (1.5**2 + 2**2) / 2)
    values = {name: float(value) for name, value in result.metrics.items()}
    assert values == pytest.approx(
        {"nll": 2.5, "td_error": 3.125, "reward": 0.25, "reward_std": 1.75, "q": 1.5, "value": 4.0}
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lambda_td=st.sampled_from([0.0, 0.1, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    truncated=st.sampled_from(["bootstrap", "drop"]),
    likelihood=st.sampled_from([0.0, 1.0]),
)
def test_against_the_definition_one_token_at_a_time(seed: int, **options: Any) -> None:
    data = batch(seed)
    data["logits"].requires_grad_()
    got, want = loss_of(data, **options), reference(data, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if want.requires_grad:
        grads = [torch.autograd.grad(x, data["logits"])[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("truncated", ["bootstrap", "drop"])
def test_gradcheck(truncated: str) -> None:
    data = batch(3)
    assert data["mask"].any()
    assert not data["ended"].all()

    def loss(q: Tensor, lse: Tensor, kl: Tensor) -> Tensor:
        options = {"gamma": 0.9, "lambda_td": 0.3, "temperature": 0.7, "truncated": truncated, "lambda_kl": 0.2}
        return iq_learn_loss(q, lse, data["mask"], ended=data["ended"], kl=kl, **options).loss

    q, lse = statistics(data, 0.7)
    inputs = [x.detach().requires_grad_() for x in (q, lse, torch.rand_like(q))]
    assert torch.autograd.gradcheck(loss, inputs)


# Properties


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_rewards_of_a_response_telescope(seed: int, temperature: float) -> None:
    """gamma = 1: the sum of r_t is tau log pi(y|x) + V(x), less V of the state a cut-off response ends in."""
    data = batch(seed)
    q, lse = statistics(data, temperature)
    rewards = iq_learn_rewards(q, lse, data["mask"], ended=data["ended"], temperature=temperature)
    logprob = torch.where(data["mask"], q - temperature * lse, 0.0).sum(dim=1)
    for row, mask in enumerate(data["mask"]):
        if mask.any():
            first, last = mask.nonzero()[[0, -1], 0]
            after = 0.0 if data["ended"][row] else temperature * lse[row, last + 1]
            want = logprob[row] + temperature * lse[row, first] - after
            assert abs(float(rewards.returns[row] - want)) < 1e-10


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), split=st.integers(1, 4))
def test_micro_batches_add_up_to_the_batch(seed: int, split: int) -> None:
    data = batch(seed)
    data["mask"][0] = torch.arange(9) < 3
    q, lse = statistics(data)
    count = int(data["mask"].sum())
    parts = [
        iq_learn_loss(q[rows], lse[rows], data["mask"][rows], ended=data["ended"][rows], denominator=count).loss
        for rows in (slice(0, split), slice(split, None))
    ]
    torch.testing.assert_close(sum(parts), loss_of(data), rtol=1e-12, atol=1e-12)


def test_the_gradient_flows_through_the_next_value() -> None:
    lse = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    options: dict[str, Any] = {"ended": torch.tensor([True]), "lambda_td": 1.0, "likelihood": 0.0}
    iq_learn_loss(q, lse, torch.ones(1, 2), **options).loss.backward()
    assert lse.grad is not None
    assert lse.grad[0].tolist() == [0.0, pytest.approx(-2 * (0.5 - 2.0) / 2)]


def test_lambda_zero_is_supervised_fine_tuning() -> None:
    data = batch(1)
    logprob = data["logits"].log_softmax(-1).gather(-1, data["labels"][..., None])[..., 0]
    torch.testing.assert_close(loss_of(data, lambda_td=0.0), -logprob[data["mask"]].mean())


def test_a_confident_token_keeps_its_loss_where_the_logprob_is_given() -> None:
    """At logits of 100 float32 has 7.6e-6 between neighbours: q - lse is 0, log pi is not."""
    logits = torch.tensor([[[100.0, 86.0]]])
    logprob, _, lse = ops.token_stats(logits, torch.tensor([[0]]))
    data: dict[str, Any] = {"mask": torch.ones(1, 1), "ended": torch.tensor([True]), "lambda_td": 0.0}
    assert float(iq_learn_loss(logits[..., 0], lse, **data).loss) == 0.0
    given = iq_learn_loss(logits[..., 0], lse, logprob=logprob, **data).loss
    assert float(given) == pytest.approx(math.log1p(math.exp(-14.0)), rel=1e-5)


@pytest.mark.parametrize("truncated", ["bootstrap", "drop"])
def test_no_tokens_no_loss(truncated: str) -> None:
    data = batch(0)
    data["mask"].zero_()
    data["logits"].requires_grad_()
    loss = loss_of(data, truncated=truncated)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not data["logits"].grad.any()


def test_online_square_is_the_weighted_mean_of_demonstrations_and_samples() -> None:
    experts, samples = batch(5), batch(6)
    rate, lambda_td = 0.3, 0.7
    got = loss_of(experts, lambda_td=(1 - rate) * lambda_td) + loss_of(
        samples, likelihood=0.0, lambda_td=rate * lambda_td
    )
    options = {"gamma": 1.0, "temperature": 1.0, "truncated": "bootstrap"}
    squares = [reference(d, lambda_td=1.0, likelihood=0.0, **options) for d in (experts, samples)]
    want = reference(experts, lambda_td=0.0, **options) + lambda_td * ((1 - rate) * squares[0] + rate * squares[1])
    torch.testing.assert_close(got, want)


# From hidden states


def head(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(5, 9, 6),
        "weight": normal(VOCAB, 6),
        "bias": normal(VOCAB),
        "ref_hidden": normal(5, 9, 4),
        "ref_weight": normal(VOCAB, 4),
        "ref_bias": normal(VOCAB),
    }


def whole_logits_loss(
    x: dict[str, Tensor], data: Batch, *, temperature: float, softcap: float | None, **o: Any
) -> Tensor:
    """From whole logits, in eager PyTorch, the KL written out."""
    scaled = []
    for states, weight, bias in (
        (x["hidden"], x["weight"], x["bias"]),
        (x["ref_hidden"], x["ref_weight"], x["ref_bias"]),
    ):
        logits = states @ weight.T + bias
        scaled.append(logits if softcap is None else softcap * torch.tanh(logits / softcap))
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in scaled)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    q, lse = statistics({**data, "logits": scaled[0]}, temperature)
    return iq_learn_loss(q, lse, data["mask"], ended=data["ended"], temperature=temperature, kl=kl, **o).loss


@pytest.mark.parametrize("truncated", ["bootstrap", "drop"])
@pytest.mark.parametrize("lambda_kl", [0.0, 0.4])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 4.0)])
def test_linear_loss_is_that_of_whole_logits(
    truncated: str, lambda_kl: float, temperature: float, softcap: float | None
) -> None:
    data, x = batch(3), head(4)
    trained = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    options: dict[str, Any] = {"gamma": 0.9, "lambda_td": 0.3, "truncated": truncated, "lambda_kl": lambda_kl}
    options |= {"temperature": temperature, "softcap": softcap}
    given = x if lambda_kl else {name: x[name] for name in ("hidden", "weight", "bias")}
    got = linear_iq_learn_loss(labels=data["labels"], mask=data["mask"], ended=data["ended"], **given, **options)
    want = whole_logits_loss(x, data, **options)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, trained) for loss in (got.loss, want)]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
    assert ("kl" in got.metrics) == bool(lambda_kl)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_linear_gradcheck(mode: str) -> None:
    data, x = batch(3), head(4)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_iq_learn_loss(
            hidden,
            weight,
            data["labels"],
            data["mask"],
            ended=data["ended"],
            bias=bias,
            gamma=0.9,
            lambda_td=0.3,
            mode=mode,
        ).loss

    assert torch.autograd.gradcheck(loss, [x[name].requires_grad_() for name in ("hidden", "weight", "bias")])


def test_linear_loss_in_float32_is_near_float64() -> None:
    data = batch(3)
    losses = []
    for dtype in (torch.float32, torch.float64):
        x = head(4, torch.float32)
        arguments = {name: x[name].to(dtype) for name in ("hidden", "weight", "bias")}
        losses.append(
            linear_iq_learn_loss(labels=data["labels"], mask=data["mask"], ended=data["ended"], **arguments).loss
        )
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-5)


# Mistakes of an earlier port


def test_port_padding_enters_no_mean_and_has_exactly_no_gradient() -> None:
    """There, padding entered both means, and the loss could fall without bound by padding's own logits."""
    data = batch(7)
    assert data["mask"].any()
    read = data["mask"].clone()
    read[:, 1:] |= data["mask"][:, :-1] & ~data["ended"][:, None]  # the state that a cut-off response ends in
    losses = []
    for fill in (0.0, 1e6, float("nan"), float("inf")):
        logits = torch.where(read[..., None], data["logits"], fill)
        q, lse = (s.detach().requires_grad_() for s in statistics({**data, "logits": logits}))
        loss = iq_learn_loss(q, lse, data["mask"], ended=data["ended"]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert q.grad[~data["mask"]].tolist() == [0.0] * int((~data["mask"]).sum())
        assert lse.grad[~read].tolist() == [0.0] * int((~read).sum())
    assert len(set(losses)) == 1


def test_port_the_value_after_the_end_is_zero_and_not_paddings() -> None:
    q, lse = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[3.0, 5.0, 7.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = [
        iq_learn_rewards(q, lse, mask, ended=torch.tensor([ended]), truncated=truncated).rewards.tolist()
        for ended, truncated in ((True, "bootstrap"), (True, "drop"), (False, "bootstrap"), (False, "drop"))
    ]
    assert rewards == [[[-4.0, 2.0, 0.0]], [[-4.0, 2.0, 0.0]], [[-4.0, -5.0, 0.0]], [[-4.0, 0.0, 0.0]]]


def test_port_prompt_tokens_are_not_trained() -> None:
    data = batch(2)
    data["mask"] = torch.arange(9).expand(5, 9) >= 4
    data["mask"] &= torch.arange(9) < 8
    data["logits"].requires_grad_()
    loss_of(data).backward()
    assert not data["logits"].grad[:, :4].any()
    assert data["logits"].grad[:, 4:8].any()


def test_port_the_kl_is_not_the_likelihood_again() -> None:
    """There, the "KL" was the estimator on demonstrations' tokens: its gradient is the NLL's, times a constant."""
    data, x = batch(3), head(4)
    weight = x["weight"].requires_grad_()
    given = {**x, "labels": data["labels"], "mask": data["mask"], "ended": data["ended"]}

    def gradient(**options: float) -> Tensor:
        return torch.autograd.grad(linear_iq_learn_loss(**given, lambda_td=0.0, **options).loss, weight)[0].flatten()

    nll, kl = gradient(lambda_kl=0.0), gradient(likelihood=0.0, lambda_kl=1.0)
    assert abs(float(torch.cosine_similarity(nll, kl, dim=0))) < 0.9
    same = {**given, "ref_hidden": x["hidden"].detach(), "ref_weight": x["weight"].detach(), "ref_bias": x["bias"]}
    assert float(linear_iq_learn_loss(**same).metrics["kl"]) == pytest.approx(0.0, abs=1e-12)


def test_port_the_temperature_is_used() -> None:
    data = batch(3)
    assert len({float(loss_of(data, temperature=t)) for t in (0.5, 1.0, 2.0)}) == 3


def test_sampled_kl_has_the_gradient_of_the_reverse_kl() -> None:
    """In expectation over the policy's own tokens, summed exactly; k3 without the ratio has the forward KL's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    want = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)[0]
    drawn = log_p.detach().exp()
    got = torch.autograd.grad((drawn * sampled_kl(log_p, log_q)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(got, want)
    plain = torch.autograd.grad((drawn * ops.kl_estimate(log_p, log_q, estimator="k3")).sum(), logits)[0]
    assert float((plain - want).abs().max()) > 0.01


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5; expected a discount"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive"),
        ({"lambda_td": -1.0}, "lambda_td is -1.0; expected a weight of at least 0"),
        ({"lambda_kl": 0.1}, "lambda_kl is 0.1 and kl is None"),
        ({"truncated": "ignore"}, "truncated is 'ignore'; expected one of"),
        ({"ended": torch.ones(3, dtype=torch.bool)}, r"ended has shape \(3,\); expected \(2,\)"),
        ({"mask": torch.ones(2, 3)}, r"mask has shape \(2, 3\); expected \(2, 4\)"),
        ({"logprob": torch.ones(2, 3)}, r"logprob has shape \(2, 3\)"),
        ({"mask": torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])}, r"mask\[0\] has a gap"),
        ({"ended": torch.tensor([True, False])}, "row 1 was cut off at the last of 4 columns"),
        ({"denominator": 0}, "denominator is 0; expected a positive"),
    ],
)
def test_bad_input_is_said(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"mask": torch.ones(2, 4), "ended": torch.ones(2, dtype=torch.bool), **change}
    with pytest.raises(ValueError, match=message):
        iq_learn_loss(torch.zeros(2, 4), torch.zeros(2, 4), **given)


def test_bad_input_of_the_linear_loss_is_said() -> None:
    x, data = head(0), batch(0)
    given = {"labels": data["labels"], "mask": data["mask"], "ended": data["ended"]}
    with pytest.raises(ValueError, match=r"lambda_kl is 0\.1 without a reference"):
        linear_iq_learn_loss(x["hidden"], x["weight"], lambda_kl=0.1, **given)
    with pytest.raises(ValueError, match="ref_hidden and ref_weight go together"):
        linear_iq_learn_loss(x["hidden"], x["weight"], ref_hidden=x["ref_hidden"], **given)
    with pytest.raises(ValueError, match=r"hidden has shape \(5, 8, 6\), labels \(5, 9\)"):
        linear_iq_learn_loss(x["hidden"][:, 1:], x["weight"], **given)
