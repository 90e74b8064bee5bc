"""irlfast's functions for slime beside slime's own: `python -m bench.slime`."""
