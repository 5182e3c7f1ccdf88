"""Implementations, one file an op or a device; `hydra_kernels` is the public surface."""
