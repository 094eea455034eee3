"""Simulated integer kernels: what integer hardware would compute from a compressed model."""
