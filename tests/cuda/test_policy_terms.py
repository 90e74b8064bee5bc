"""The CUDA policy_terms, through the public op: the Triton kernel"s tests."""

from __future__ import annotations

from reuse import reuse

globals().update(reuse("test_policy_terms", but=("test_a_denominator_that_is_read_on_the_device",)))
