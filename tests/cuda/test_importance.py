"""The CUDA importance_weights, through the public op: the Triton kernel"s tests."""

from __future__ import annotations

from reuse import reuse

globals().update(reuse("test_importance"))
