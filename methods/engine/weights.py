"""Decoded weights as the signed integers a kernel multiplies by."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.artifact import Affine, Codebook, CompressedTensor, Levels


@dataclass(frozen=True)
class IntegerWeight:
    """value ≈ scale * integers, exact for uniform grids.

    integers  int32 [C_out, ...], 0 exactly where the weight is pruned
    scale     float64 [C_out]
    width     operand width in bits: 8, or 16 where 8 would lose a level
    """

    integers: Tensor
    scale: Tensor
    width: int


def integer_weight(tensor: CompressedTensor) -> IntegerWeight:
    """The integers of a compressed tensor. Uniform grids are taken as they are; a codebook is put on a table
    of 8-bit integers, or of 16-bit ones where two used entries would coincide or a non-zero one would be 0."""
    if isinstance(tensor.grid, Codebook):
        table, scale, width = integer_table(tensor.grid.values, tensor.codes[tensor.mask])
        integers = torch.where(tensor.mask, table[tensor.codes.long()], torch.zeros((), dtype=torch.int32))
        scales = torch.full((tensor.codes.shape[0],), scale, dtype=torch.float64)
    else:
        integers = torch.where(tensor.mask, tensor.grid.integers(tensor.codes), torch.zeros((), dtype=torch.int32))
        scales = tensor.grid.scale.double().expand(tensor.codes.shape[0])
        fits = integers.numel() == 0 or (int(integers.min()) >= -128 and int(integers.max()) <= 127)
        width = 8 if fits else 16
    return IntegerWeight(integers, scales, width)


def operand_bits(tensor: CompressedTensor) -> int:
    """Width of the weight operand of a multiplier: the code's on an affine grid, that of the signed integers on
    Levels, and for a codebook the width of its integer table (8 or 16), however few bits select an entry."""
    if isinstance(tensor.grid, Affine):
        return tensor.bits
    if isinstance(tensor.grid, Levels):
        return int(tensor.grid.levels.abs().max()).bit_length() + 1
    return table_width(tensor.grid.values, tensor.codes[tensor.mask].unique())


def integer_table(values: Tensor, codes: Tensor) -> tuple[Tensor, float, int]:
    """int32 table of a codebook, its scale, and the operand width (8 or 16); `codes` [n] of the kept weights.

    The largest entry in use becomes an integer from 64 to 127, the one that leaves the least squared error over all
    weights: an entry's own error is one of every weight that has it, and as these have a sign that moves what a layer
    puts out. 16 bits where 127 would make a used non-zero entry 0, or two of them one; then the largest is 32,767, and
    an entry below half a step is moved to one step.
    """
    if len(codes) == 0:
        return torch.zeros(len(values), dtype=torch.int32), 1.0, 8
    used, counts = codes.long().unique(return_counts=True)
    exact, peak = values.double(), float(values[used].double().abs().max())
    if table_width(values, used) == 8:
        scale = min((peak / top for top in range(127, 63, -1) if keeps_apart(exact[used], peak / top)),
                    key=lambda scale: squared_error(exact[used], counts, scale))
        return on_scale(exact, scale, 127), scale, 8
    scale = peak / 32767
    table = on_scale(exact, scale, 32767)
    return torch.where((table == 0) & (exact != 0), exact.sign().to(torch.int32), table), scale, 16


def table_width(values: Tensor, used: Tensor) -> int:
    """8 where the finest table of 8 bits keeps the used entries of a codebook apart, and from 0; else 16."""
    kept = values[used.long()].double()
    return 8 if len(kept) == 0 or keeps_apart(kept, float(kept.abs().max()) / 127) else 16


def on_scale(values: Tensor, scale: float, largest: int) -> Tensor:
    return torch.round(values / scale).clamp(-largest, largest).to(torch.int32)


def keeps_apart(values: Tensor, scale: float) -> bool:
    """Whether no value becomes 0 on a scale, and no two of them one."""
    table = torch.round(values / scale)
    return not bool((table == 0).any()) and len(table.unique()) == len(values.unique())


def squared_error(values: Tensor, counts: Tensor, scale: float) -> float:
    """Of weights that have these values so often; the sum is exact, so that equal files have equal tables anywhere."""
    off = torch.round(values / scale) * scale - values
    return math.fsum((off * off * counts).tolist())
