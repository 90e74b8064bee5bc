"""How far the trainer's log-probs of sampled tokens lie from those that the sampler reported, and when to worry.

Both are of the model alone, at temperature 1. Where trainer and sampler hold the same weights the gap is arithmetic:
other kernels, another dtype, another order of sums. It biases every policy step, since the samples are then not the
policy's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from irlfast.rollout import Rollouts

logger = logging.getLogger("irlfast")

EDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The mean gap, in nats a token, that is worth a warning wherever it came from, and the least that growth is worth one
# at.
_ALARMING, _NOTABLE = 0.05, 1e-3
_GROWTH = 3.0
_WINDOW = 20


@torch.no_grad()
def gap_metrics(logprobs: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """The gap of one batch.

    Args:
        logprobs: [B, S] the trainer's log-probs of the sampled tokens.
        rollouts: with the sampler's.

    Returns:
        gap_mean, gap_max: of |trainer - sampler| over response tokens, nats; gap_above_E: share of tokens whose gap is
        above E, for each of EDGES: the histogram, cumulated from above.
    """
    gap = (logprobs.float() - rollouts.model_logprobs).abs()[rollouts.response_mask]
    if gap.numel() == 0:
        return {}
    values = torch.stack([gap.mean(), gap.max(), *((gap > edge).float().mean() for edge in EDGES)]).tolist()
    return dict(zip(("gap_mean", "gap_max", *(f"gap_above_{edge:g}" for edge in EDGES)), values, strict=True))


def version_lag(rollouts: Rollouts, version: int) -> dict[str, float]:
    """lag_mean, lag_max: how many versions the policy is ahead of the weights that sampled a token."""
    if rollouts.versions is None:
        return {}
    lag = (version - rollouts.versions)[rollouts.response_mask].float()
    return {"lag_mean": float(lag.mean()), "lag_max": float(lag.max())} if lag.numel() else {}


class MismatchWatch:
    """Says in words when the gap grows, at most once in a window of steps."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self._quiet = 0

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """Take in one step's metrics; the warning, which is logged too, or None."""
        gap = metrics.get("gap_mean")
        if gap is None:
            return None
        usual = median(self._seen) if len(self._seen) >= 5 else None
        self._seen.append(gap)
        self._quiet -= 1
        grown = usual is not None and gap > max(_NOTABLE, _GROWTH * usual)
        if self._quiet > 0 or not (grown or not gap <= _ALARMING):  # so that NaN is not passed over
            return None
        self._quiet = _WINDOW
        before = "" if usual is None else f", usually {usual:.2g}"
        lag = metrics.get("lag_mean", 0.0)
        late = f" The samples are {lag:.3g} versions old on average." if lag > 0 else ""
        text = (
            f"the trainer's log-probs of sampled tokens differ from the sampler's by {gap:.2g} nats a token{before} "
            f"(largest {metrics['gap_max']:.2g}).{late} Sample in the dtype that is trained in, unquantised; correct "
            "with "
            "policy.tis_cap (2) or, where single tokens are far off, policy.icepop_band (0.5 5); "
            + ("lower overlap or policy.optimizer.lr" if lag > 0 else "see docs/sglang.md, Mismatch")
        )
        logger.warning("%s", text)
        return text
