"""A pass: what stays float in 16 bits, which the file then stores in 16 bits.

Biases, batch norm, scales and shared values are rounded to float16 or bfloat16, whichever is nearer, and stay float32
in memory. This changes the network a little: it is a step that a row names, not a property of the file.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..artifact import Codebook, CompressedModel, CompressedTensor, Grid

FORMATS = (torch.float16, torch.bfloat16)


def sixteen_bit(compressed: CompressedModel) -> CompressedModel:
    """The same model with scales, shared values and one-dimensional float32 tensors rounded to 16 bits.

    A tensor that would lose a sign, a zero or become infinite in both formats stays as it is; so do tensors of more
    dimensions, the weights of layers that are not stored as codes.

    Example:

    >>> import torch
    >>> from torch import nn
    >>> from jointcompress.methods.core.graph.build import assemble
    >>> small = sixteen_bit(assemble(nn.Linear(2, 1), {}))
    >>> bool((small.rest["bias"] == small.rest["bias"].half().float()).all())
    True
    """
    return replace(compressed, weights={name: rounded(tensor) for name, tensor in compressed.weights.items()},
                   rest={name: nearest_16_bit(tensor) if tensor.dtype == torch.float32 and tensor.ndim == 1 else tensor
                         for name, tensor in compressed.rest.items()})


def rounded(tensor: CompressedTensor) -> CompressedTensor:
    """The same codes on a grid whose scales, or shared values, are rounded to 16 bits."""
    grid: Grid = tensor.grid
    grid = (replace(grid, values=nearest_16_bit(grid.values)) if isinstance(grid, Codebook)
            else replace(grid, scale=nearest_16_bit(grid.scale)))
    return CompressedTensor.of(tensor.codes, grid, tensor.bits, tensor.mask)


def nearest_16_bit(tensor: Tensor) -> Tensor:
    """float32 values of one 16-bit format, the one with the smaller squared error; `tensor` if neither holds it."""
    rounded = [tensor.to(dtype).to(torch.float32) for dtype in FORMATS]
    good = [one for one in rounded if bool(one.isfinite().all()) and torch.equal(one.sign(), tensor.sign())]
    return min(good, key=lambda one: float((one.double() - tensor.double()).square().sum()), default=tensor)
