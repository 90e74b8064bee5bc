"""Whole training runs by what samples them: `python -m bench.rollout`."""
