"""Triton kernels, installed as ``irlfast.kernels``; one module an op, named as the op, and what they share in modules
whose names begin with an underscore. Importing one imports Triton; importing irlfast imports none of them."""
