"""Experiments whose results lie in docs/results: `python -m bench.experiments.NAME --help`."""
