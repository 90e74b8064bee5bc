"""Single-sample estimators of the reverse KL divergence KL(pi || ref) from the sampled token.

With d = log pi(y) - log ref(y) and y drawn from pi (Schulman, "Approximating KL Divergence", 2020):

    k1 = d            k2 = d^2 / 2            k3 = exp(-d) - 1 + d

E[k1] = E[k3] = KL(pi || ref); k2 is biased, to second order equal, and like k3 never negative.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from irlfast.ops._segments import compute_dtype, require_floating

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate_reference(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """The three formulas as they stand, in float64."""
    d = logprobs.double() - ref_logprobs.double()
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]


def kl_estimate(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # the same shape
    *,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:
    """Estimate KL(pi || ref) at each sampled token, in nats.

    As a number to report, or detached inside a reward, every estimator will do, and k1 is the usual one. As a term
    of a loss they differ, for the samples come from pi itself and a gradient through them is not the gradient of
    their expectation. With y ~ pi, the expected gradient of

    - k1 is 0: a loss term that does nothing in expectation but add noise;
    - k2 is that of the reverse KL(pi || ref): use this one;
    - k3 is that of the FORWARD KL(ref || pi); k3 times the ratio pi / stopgrad(pi) has the reverse KL's.

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        ref_logprobs: log ref of the same tokens, the same shape.
        estimator: "k1", "k2" or "k3".

    Returns:
        As logprobs, in float32 (float64 where an input is float64). Differentiable in both arguments. Evaluated in
        float64: k3 and its gradient are differences of nearly equal numbers wherever pi is close to ref.

    Raises:
        TypeError: an argument is not floating point. ValueError: shapes differ, or an unknown estimator.
    """
    require_floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"ref_logprobs has shape {tuple(ref_logprobs.shape)}; expected that of logprobs, {tuple(logprobs.shape)}"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {ESTIMATORS}")
    d = logprobs.double() - ref_logprobs.double()
    if estimator == "k2":
        d = d.square() / 2
    elif estimator == "k3":
        d = torch.expm1(-d) + d
    return d.to(compute_dtype(logprobs, ref_logprobs))
