"""What a code costs in an entropy-coded file, and rounding that counts it.

    bits(q) = -log2 of the share of q among the codes of a layer
    code of w = the q that minimises (w / s - q)^2 + lam bits(q)

At a high rate the error of a uniform grid is D = s^2 / 12 and its rate -log2 s + constant, so that
dD/dR = -(s^2 / 6) ln 2: a code's bit is worth lam = ln 2 / 6 in units of s^2 (Gish & Pierce 1968).
"""

import math

import torch
from torch import Tensor

LAM = math.log(2) / 6  # price of a bit in units of s^2
POWER, MOST = 0.8, 1.1  # of `steered`
UNSEEN = 0.05  # counted for every code, so that one that does not occur has a finite price


def entropy_bits(counts: Tensor) -> float:
    """Bits of all symbols together under their own zero-order statistics: sum_q n_q log2(n / n_q)."""
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def steered(bits: float, wanted: float, least: float = 1 / MOST, power: float = POWER) -> float:
    """The factor on a price in training, where codes take `bits` and `wanted` are asked for: at least `least`.

    >>> [round(steered(bits, 100.0), 3) for bits in (50.0, 97.0, 100.0, 103.0, 200.0)]
    [0.909, 0.976, 1.0, 1.024, 1.1]
    """
    return min(max((bits / wanted) ** power, least), MOST)


def between(start: float, goal: float, steps: float, total: float) -> float:
    """What is wanted after `steps` of `total` from `start` to `goal`, both positive: geometric, and then `goal`.

    >>> [between(100.0, 25.0, steps, 4) for steps in (0, 2, 4, 9)], between(100.0, 25.0, 0, 0)
    ([100.0, 50.0, 25.0, 25.0], 25.0)
    """
    share = min(steps / total, 1.0) if total > 0 else 1.0
    return start ** (1 - share) * goal**share


def code_bits(codes: Tensor, low: int, high: int) -> Tensor:
    """float32 [high - low + 1]: bits(low), ..., bits(high) after the shares in `codes`, which lie in that range."""
    counts = torch.bincount((codes.reshape(-1) - low).long(), minlength=high - low + 1).double() + UNSEEN
    return (counts.sum() / counts).log2().float()


def magnitude_bits(counts: Tensor) -> Tensor:
    """bits(|q|) for |q| = 0, 1, ... from their counts; a magnitude above 0 pays one bit more for its sign."""
    counts = counts.double() + UNSEEN
    bits = (counts.sum() / counts).log2()
    bits[1:] += 1
    return bits.float()


def thresholds(bits: Tensor, lam: float) -> Tensor:
    """[len(bits) - 1] rising: |w| / s below the k-th has a code below k + 1.

    Between k and k + 1: k + 1/2 + lam / 2 (bits(k + 1) - bits(k)), where both cost the same. A smaller code is never
    the dearer one: where it became rare it would become rarer with every look, until none is left.
    """
    edges = torch.arange(len(bits) - 1, device=bits.device) + 0.5 + lam / 2 * bits.diff().clamp_min(0)
    return edges.cummax(0).values


def round_to_rate(scaled: Tensor, lam: float = LAM, rounds: int = 3) -> tuple[Tensor, float]:
    """(counts of the magnitudes of the codes, bits of all codes) for w / s = `scaled`, rounded with prices.

    The prices follow the codes and the codes the prices, `rounds` times, from rounding to the nearest.
    """
    size = scaled.abs().reshape(-1)
    top = int(size.max().round()) + 2 if len(size) else 2
    counts = torch.bincount(size.round().long(), minlength=top)
    for _ in range(rounds):
        edges = thresholds(magnitude_bits(counts), lam)
        counts = torch.bincount(torch.bucketize(size, edges, right=True), minlength=top)
    return counts, entropy_bits(counts) + float(counts[1:].sum())
