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


def assert_close(found: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    """Two float32 computations, each within 1e-5 of what is exact; absolute for values up to 1 and relative above."""
    gap = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max()
    assert float(gap) <= bound, f"{float(gap):.3g} above {bound:g}"


def assert_as_exact(found: Tensor, single: Tensor, exact: Tensor) -> None:
    """At most 1e-5 further from float64 than transformers itself is in float32, the rule for every kernel here."""
    scale = exact.abs().clamp(min=1.0)
    own = float(((single - exact).abs() / scale).max())
    gap = float(((found - exact).abs() / scale).max())
    assert gap <= own + 1e-5, f"{gap:.3g} from float64, transformers {own:.3g}"


def assert_sampled_apart(batch: Sequences, n: int) -> None:
    """A prompt's n samples are n samples. Two short ones of a prompt may be alike; not so of every prompt."""
    rows = [tuple(row) for row in batch.input_ids.tolist()]
    assert any(len(set(rows[low : low + n])) == n for low in range(0, len(rows), n))


def changed(policy: Any, scale: float = 0.05) -> None:
    """Move every weight by noise of `scale` times its tensor's standard deviation, the same each time."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += scale * parameter.std() * noise
