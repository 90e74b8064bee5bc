"""ops.kl_estimate: values, and what each estimator's gradient is the gradient of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irlfast.ops import kl_estimate
from irlfast.ops.kl_estimate import ESTIMATORS, kl_estimate_reference


def test_values_by_hand() -> None:
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5])
    assert kl_estimate(logprobs, ref).tolist() == [2.0, -0.5]
    assert kl_estimate(logprobs, ref, estimator="k2").tolist() == [2.0, 0.125]
    want = [math.exp(-2) - 1 + 2, math.exp(0.5) - 1 - 0.5]
    assert kl_estimate(logprobs, ref, estimator="k3").tolist() == pytest.approx(want)


@settings(deadline=None)
@given(
    a=st.floats(-20, 0),
    d=st.floats(-10, 10),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_against_reference(a: float, d: float, estimator: str) -> None:
    logprobs = torch.tensor([a], dtype=torch.float64)
    got = kl_estimate(logprobs, logprobs - d, estimator=estimator)
    want = kl_estimate_reference(logprobs, logprobs - d, estimator=estimator)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    if estimator != "k1":
        assert float(got) >= 0


def test_k3_and_its_gradient_near_zero_keep_their_digits() -> None:
    """In float32, exp(-d) - 1 + d at d = 2^-13 has no right digit, and 1 - exp(-d) three."""
    d = 2.0**-13
    logprobs = torch.tensor([-1.0 + d], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([-1.0]), estimator="k3")
    estimate.backward()
    assert float(estimate.detach()) == pytest.approx(d**2 / 2 - d**3 / 6, rel=1e-6)
    assert float(logprobs.grad) == pytest.approx(-math.expm1(-d), rel=1e-6)


def _expected_gradient(logits: Tensor, ref: Tensor, estimator: str, *, ratio: bool) -> Tensor:
    """E_{y ~ pi} of the gradient of the estimator, summed over the whole vocabulary, y held fixed."""
    log_pi = torch.log_softmax(logits, dim=0)
    term = kl_estimate(log_pi, torch.log_softmax(ref, dim=0), estimator=estimator)
    if ratio:
        term = term * torch.exp(log_pi - log_pi.detach())
    (gradient,) = torch.autograd.grad((log_pi.detach().exp() * term).sum(), logits)
    return gradient


def test_expected_gradients_are_those_the_docstring_names() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64)
    p, log_q = logits.softmax(0), ref.log_softmax(0)
    (reverse,) = torch.autograd.grad((p * (p.log() - log_q)).sum(), logits)
    (forward,) = torch.autograd.grad((log_q.exp() * (log_q - logits.log_softmax(0))).sum(), logits)
    assert float((reverse - forward).abs().max()) > 0.05  # else the next lines could not tell them apart

    def close(gradient: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-12)

    close(_expected_gradient(logits, ref, "k1", ratio=False), torch.zeros(7, dtype=torch.float64))
    close(_expected_gradient(logits, ref, "k2", ratio=False), reverse)
    close(_expected_gradient(logits, ref, "k3", ratio=False), forward)
    close(_expected_gradient(logits, ref, "k3", ratio=True), reverse)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator=estimator), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: kl_estimate(a, b, estimator=estimator), inputs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_to_one_graph(estimator: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    compiled = torch.compile(lambda a, b: kl_estimate(a, b, estimator=estimator), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), kl_estimate(a, b, estimator=estimator))


@pytest.mark.parametrize(
    ("given_dtype", "want"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype(given_dtype: torch.dtype, want: torch.dtype) -> None:
    assert kl_estimate(torch.zeros(3, dtype=given_dtype), torch.zeros(3, dtype=given_dtype)).dtype == want


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2, 1\); expected that of logprobs, \(2, 3\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"estimator is 'k4'; expected one of \('k1', 'k2', 'k3'\)"):
        kl_estimate(torch.zeros(2), torch.zeros(2), estimator="k4")
    with pytest.raises(TypeError, match=r"ref_logprobs has dtype torch.int64"):
        kl_estimate(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
