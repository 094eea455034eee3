"""Uniform symmetric grids without a zero: scale * {-(2^b - 1), …, -1, 1, …, 2^b - 1}, 2^b levels two steps apart."""

import torch
from torch import Tensor

from ..artifact import CompressedTensor, Levels

TINY = torch.finfo(torch.float32).tiny


def quantize_odd(weight: Tensor, bits: int, factors: Tensor | None = None, *,
                 per_channel: bool = False) -> CompressedTensor:
    """`weight` [C_out, ...] on the grid whose outer levels are its largest magnitude (per tensor or channel).

        W~ = 2 / (2^b - 1) * round((2^b - 1) (W / (2 max|W|) + 1/2)) - 1,   values max|W| * W~

    Half is rounded to even; a weight of exactly 0 becomes scale or -scale, and a tensor or channel of zeros stays 0.
    factors   [C_out] >= 0: the values are multiplied by them, which makes the scale one per channel
    """
    top = (1 << bits) - 1
    weight = weight.detach().double().cpu()
    flat = weight.reshape(weight.shape[0], -1)
    peak = flat.abs().amax(1, keepdim=True) if per_channel else flat.abs().max().reshape(1, 1)
    codes = torch.round(top * (flat / (2 * torch.where(peak > 0, peak, 1.0)) + 0.5)).to(torch.int32)
    scale = peak / top
    if factors is not None:
        scale = scale * factors.reshape(-1, 1)
    mask = (scale > 0).expand_as(flat).reshape(weight.shape)
    scale = torch.where(scale > 0, scale.clamp_min(TINY), 1.0).float()
    levels = torch.arange(-top, top + 1, 2, dtype=torch.int32)
    grid = Levels(scale.reshape(-1) if scale.numel() > 1 or per_channel or factors is not None else scale[0, 0], levels)
    return CompressedTensor.of(codes.reshape(weight.shape), grid, bits, mask)
