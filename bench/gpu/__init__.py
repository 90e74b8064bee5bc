"""`python -m bench gpu`: the ops on a GPU, beside peers and the device's own ceilings, within a few minutes."""
