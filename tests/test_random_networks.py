"""Random small networks: the fast network equals the exact one, and that its definition in int64, code by code."""

import time

from .random_networks import compare

SECONDS, NETWORKS = 7, 300  # of CPU time, and at most so many


def test_random_networks_are_exact():
    start, layers, slow = time.process_time(), 0, 0
    for seed in range(NETWORKS):
        found = compare(seed)
        assert found[1] == 0, f"network {seed}: see tests/random_networks.py"
        layers, slow = layers + found[0], slow + len(found[2])
        if time.process_time() - start > SECONDS:
            break
    assert layers > 20 and slow < layers  # the int8 kernels have their share
