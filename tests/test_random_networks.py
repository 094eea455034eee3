"""Random small networks: the fast network equals the exact one, and that its definition in int64, code by code."""

import time

import pytest

from methods.engine import fast, onednn

from .random_networks import compare

SECONDS, NETWORKS = 5, 200  # of CPU time, and at most so many


@pytest.mark.parametrize("first, products", [(0, fast.PRODUCTS), (10_000, 1)])
def test_random_networks_are_exact(first, products, monkeypatch):
    """products 1: every sum that is read in several forms is taken once, as those of many products are."""
    monkeypatch.setattr(fast, "PRODUCTS", products)
    start, layers, slow = time.process_time(), 0, 0
    for seed in range(first, first + NETWORKS):
        found = compare(seed)
        assert found[1] == 0, f"network {seed}: see tests/random_networks.py"
        layers, slow = layers + found[0], slow + len(found[2])
        if time.process_time() - start > SECONDS:
            break
    assert layers > 20 and (onednn.unsupported() or slow < layers)  # the int8 kernels have their share
