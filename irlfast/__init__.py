"""irlfast: fused token statistics and inverse reinforcement learning for language models."""

import torch  # noqa: F401  before irlfast._native, whose OpenMP symbols resolve to the runtime torch has loaded

__version__ = "0.1.0"
