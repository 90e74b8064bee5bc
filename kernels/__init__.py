"""Triton kernels, installed as ``irlfast.kernels``; one module an op, named as the op. This release has none yet."""
