"""Differentiable statistics of token distributions and sequences. Each op is defined by its `X_reference`."""

from irlfast.ops.importance import ImportanceWeights, importance_weights
from irlfast.ops.kl_estimate import kl_estimate
from irlfast.ops.sequence import sequence_logprobs

__all__ = ["ImportanceWeights", "importance_weights", "kl_estimate", "sequence_logprobs"]
