"""What the policy in this process says of what a server sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irlfast.rollout import Sequences

EOS, PAD = 1, 0


@torch.no_grad()
def logits_of(policy: Any, batch: Sequences) -> Tensor:
    """[B, S, V], aligned so that [b, s] predicts token s; row 0 of each is of no meaning."""
    logits = policy(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    return torch.nn.functional.pad(logits[:, :-1], (0, 0, 1, 0))


def logprobs_of(policy: Any, batch: Sequences, temperature: float = 1.0) -> Tensor:
    logprobs = torch.log_softmax(logits_of(policy, batch) / temperature, -1)
    return torch.where(batch.response_mask, logprobs.gather(-1, batch.input_ids[..., None])[..., 0], 0.0)


def assert_close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Within `bound`, absolute for values up to 1 and relative above: float32 logits of 40 have no more digits."""
    gap = float(((found - expected).abs() / expected.abs().clamp(min=1.0)).max())
    assert gap <= bound, f"{gap:.3g} above {bound:g}"


def changed(policy: Any, scale: float = 0.05) -> None:
    """Move every weight by noise of `scale` times its tensor's standard deviation, the same each time."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += scale * parameter.std() * noise
