"""The reward server under load: `python -m bench.serving`."""
