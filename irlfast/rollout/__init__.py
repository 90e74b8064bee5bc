"""Rollouts: what is sampled from a policy, and the engines that sample it."""

from .base import RolloutEngine, Rollouts, SamplingParams, Sequences
from .sampling import SampledTokens, sample_tokens
from .sglang import SGLangEngine, SGLangError, SGLangOptions, SGLangServerEngine
from .transformers_engine import TransformersEngine

__all__ = [
    "RolloutEngine",
    "Rollouts",
    "SGLangEngine",
    "SGLangError",
    "SGLangOptions",
    "SGLangServerEngine",
    "SampledTokens",
    "SamplingParams",
    "Sequences",
    "TransformersEngine",
    "sample_tokens",
]
