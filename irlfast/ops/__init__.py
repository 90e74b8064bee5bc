"""Fused, differentiable statistics of token distributions."""
