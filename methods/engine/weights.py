"""Decoded weights as the signed integers a kernel multiplies by."""

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
        table, scale, width = integer_table(tensor.grid.values, tensor.codes[tensor.mask].unique())
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
    return integer_table(tensor.grid.values, tensor.codes[tensor.mask].unique())[2]


def integer_table(values: Tensor, used: Tensor) -> tuple[Tensor, float, int]:
    """int32 table of a codebook, its scale, and the operand width (8 or 16).

    No used non-zero entry becomes 0: at 16 bits an entry below half a step is moved to one step.
    """
    if len(used) == 0:
        return torch.zeros(len(values), dtype=torch.int32), 1.0, 8
    peak = float(values[used.long()].double().abs().max())
    exact = values.double()
    for width in (8, 16):
        scale = peak / ((1 << width - 1) - 1)
        table = torch.round(exact / scale).clamp(-(1 << width - 1) + 1, (1 << width - 1) - 1).to(torch.int32)
        chosen, distinct = table[used.long()], exact[used.long()].unique()
        if not bool((chosen == 0).any()) and len(chosen.unique()) == len(distinct):
            return table, scale, width
    lost = (table == 0) & (exact != 0)
    return torch.where(lost, exact.sign().to(torch.int32), table), scale, width
