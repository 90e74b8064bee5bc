"""Benchmarks, one module an op: `python -m bench OP`."""
