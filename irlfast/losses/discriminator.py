"""Telling demonstrations from samples by logistic regression, which GAIL and AIRL do on different logits.

    L = E_expert[-log sigma(z)] + E_sample[-log sigma(-z)]

with z = log p_E - log q at its optimum, q the density of the samples, and L = 2 log 2 where the two cannot be told
apart (Goodfellow et al. 2014, section 4.1). With label smoothing e the labels are 1 - e and e (Szegedy et al. 2016).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from irlfast.ops._segments import compute_dtype

from ._rewards import check_option


def smoothed_loss(logit: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z), shaped as the logits z."""
    # Not softplus, which drops what is below e^-20.
    return label_smoothing * logit - logsigmoid(logit) if label_smoothing else -logsigmoid(logit)


def check_smoothing(label_smoothing: float) -> None:
    """ValueError outside [0, 0.5), where the labels would change sides."""
    check_option(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "a share in [0, 0.5)")


def discriminator_loss(
    expert_logits: Tensor, sample_logits: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, each side's mean counting the same, and how often each side is recognised.

    Args:
        expert_logits, sample_logits: of any shape, floating point; positive says "demonstration".
        label_smoothing: e.

    Returns:
        0-d loss; metrics expert_accuracy, sample_accuracy (share of logits above, below 0).
    """
    check_smoothing(label_smoothing)
    dtype = compute_dtype(expert_logits, sample_logits)
    expert, sample = expert_logits.to(dtype), sample_logits.to(dtype)
    loss = smoothed_loss(expert, label_smoothing).mean() + smoothed_loss(-sample, label_smoothing).mean()
    metrics = {
        "expert_accuracy": (expert.detach() > 0).to(dtype).mean(),
        "sample_accuracy": (sample.detach() < 0).to(dtype).mean(),
    }
    return loss, metrics
