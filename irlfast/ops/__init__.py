"""Fused, differentiable statistics of token distributions."""

from irlfast.ops.token_stats import TokenStats, token_logprobs, token_stats, token_stats_reference

__all__ = ["TokenStats", "token_logprobs", "token_stats", "token_stats_reference"]
