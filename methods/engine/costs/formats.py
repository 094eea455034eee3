"""Bits that a weight tensor takes in the sparse formats of the literature, from its mask and its code width b.

    dense     n b
    bitmap    n + kept b
    csr       kept (b + ceil(log2 columns)) + (rows + 1) ceil(log2(kept + 1)) for the row pointers
    relative  entries (b + i), the zeros skipped since the last entry in i bits; fillers are entries
    2:4       n/2 (b + 2): of each 4 weights at most 2, each with its position
    entropy   n H(kept / n) + kept b: no format, a bound for codes that are all equally likely

Rows are filters. Where no code means 0, dense and relative need one more bit as soon as a weight is pruned.
Grids, codebooks and scales are not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError
from ...core.file.coding import filler_count

INDEX_BITS = 4
BOUNDS = ("entropy",)  # not formats


@dataclass(frozen=True)
class _Tensor:
    mask: Tensor  # bool [filters, ...]
    bits: int
    coded: int  # bits of a code that may also have to mean 0
    index_bits: int
    kept: int

    @property
    def n(self) -> int:
        return self.mask.numel()


def fits_two_four(mask: Tensor) -> bool:
    """Whether each 4 consecutive weights of a filter keep at most 2, input channels running fastest.

    That order, (K_h, K_w, C), is that of sparse tensor cores and of SPARQ; the last group may be shorter.
    """
    flat = (mask.movedim(1, -1) if mask.ndim > 2 else mask).flatten(1)
    padded = F.pad(flat, (0, -flat.shape[1] % 4))
    return bool((padded.reshape(len(flat), -1, 4).sum(2) <= 2).all())


def _dense(t: _Tensor) -> float:
    return t.n * t.coded


def _bitmap(t: _Tensor) -> float:
    return t.n + t.kept * t.bits


def _csr(t: _Tensor) -> float:
    rows = t.mask.shape[0]
    return t.kept * (t.bits + (t.n // rows - 1).bit_length()) + (rows + 1) * t.kept.bit_length()


def _relative(t: _Tensor) -> float:
    return (t.kept + filler_count(t.mask.flatten().numpy(), t.index_bits)) * (t.coded + t.index_bits)


def _two_four(t: _Tensor) -> float:
    return t.n / 2 * (t.bits + 2)


def _entropy(t: _Tensor) -> float:
    p = t.kept / t.n
    return t.n * sum(-q * math.log2(q) for q in (p, 1 - p) if q > 0) + t.kept * t.bits


FORMATS: dict[str, Callable[[_Tensor], float]] = {
    "dense": _dense, "bitmap": _bitmap, "csr": _csr, "relative": _relative, "2:4": _two_four, "entropy": _entropy,
}


def format_bits(mask: Tensor, bits: int, *, zero_code: bool = True, index_bits: int = INDEX_BITS) -> dict[str, float]:
    """{format: bits of the whole tensor}; "2:4" only where the mask fits it.

    zero_code  whether one of the 2^bits codes means 0
    """
    if bits < 1 or index_bits < 1:
        raise ConfigError(f"bits = {bits}, index_bits = {index_bits}: both must be 1 or more")
    if mask.ndim < 2 or mask.numel() == 0:
        raise ConfigError(f"a mask of shape {list(mask.shape)}: allowed is [filters, ...], with weights in it")
    kept = int(mask.sum())
    coded = bits if zero_code or kept == mask.numel() else bits + 1
    tensor = _Tensor(mask.cpu(), bits, coded, index_bits, kept)
    names = [name for name in FORMATS if name != "2:4" or fits_two_four(mask)]
    return {name: FORMATS[name](tensor) for name in names}


def bits_in(name: str, sizes: dict[str, float]) -> float:
    """The entry `name` of what `format_bits` returned; ConfigError, listing what there is, if it has none."""
    if name not in sizes:
        raise ConfigError(f"the format {name!r} cannot hold these weights; allowed are {', '.join(sizes)}")
    return sizes[name]


def smallest(sizes: dict[str, float]) -> str:
    """The name of the smallest format (bounds are not formats)."""
    return min((name for name in sizes if name not in BOUNDS), key=sizes.__getitem__)
