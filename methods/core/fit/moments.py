"""Second moments of what a layer multiplies its weights with: the Hessian of its squared output error.

With x the unfolded input of a conv (one kernel window) or of a linear layer, the output error of weights W + E is
mean |E x|^2 = tr(E H E^T), H = E[x x^T]; its mean is E m, m = E[x].
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import blas
from torch import Tensor, nn

from ..errors import CompressError

POSITIONS = 64  # kernel windows of one input that are looked at
LARGEST = 8192  # weights of an output channel; of more, H is kept in diagonal blocks only


class Moments:
    """H and m of one layer, taken over batches.

    The weights of a layer [C_out, ...] are split into G parts [R, K] that have an H of their own: its groups, and
    blocks of inputs where a channel has more than `largest`. A last block is filled up with inputs that are always 0.
    second  take H; without it there is m alone
    """

    def __init__(self, layer: nn.Module, generator: torch.Generator, positions: int = POSITIONS,
                 largest: int = LARGEST, second: bool = True):
        self.layer, self.generator, self.positions, self.second = layer, generator, positions, second
        self.groups, inputs = getattr(layer, "groups", 1), layer.weight[0].numel()
        self.blocks = -(-inputs // largest)
        self.k = -(-inputs // self.blocks)
        self.fill = self.blocks * self.k - inputs
        parts = self.groups * self.blocks
        self.sums = [np.zeros((self.k, self.k), np.float32, order="F") for _ in range(parts if second else 0)]
        self.total, self.count = torch.zeros(parts, self.k, dtype=torch.float64), 0

    def split(self, values: Tensor) -> Tensor:
        """[G, R, K] of values like the weight, [G, R] of one for each channel; a scalar as it is."""
        if values.ndim < 2:
            return values.reshape(self.groups, 1, -1).repeat(1, self.blocks, 1).flatten(0, 1) if values.ndim else values
        rows = F.pad(values.reshape(self.groups, len(values) // self.groups, -1), (0, self.fill))
        return rows.unflatten(2, (self.blocks, self.k)).transpose(1, 2).flatten(0, 1)

    def join(self, parts: Tensor) -> Tensor:
        """Values like the weight of [G, R, K]."""
        rows = parts.unflatten(0, (self.groups, self.blocks)).transpose(1, 2).flatten(2)
        return rows[:, :, :rows.shape[2] - self.fill].reshape(self.layer.weight.shape)

    def update(self, x: Tensor) -> None:
        """Take in a batch of the layer's input."""
        rows = windows(self.layer, x.detach().float().cpu(), self.positions, self.generator)  # [groups, n, inputs]
        rows = F.pad(rows, (0, self.fill)).unflatten(2, (self.blocks, self.k)).transpose(1, 2).flatten(0, 1)
        self.total += rows.sum(1, dtype=torch.float64)
        self.count += rows.shape[1]
        for i, sums in enumerate(self.sums):  # BLAS counts by columns: what is row-major here is its transpose
            blas.ssyrk(1.0, rows[i].contiguous().numpy().T, beta=1.0, c=sums, overwrite_c=True)

    def hessian(self) -> Tensor:
        """H, float32 [G, K, K]."""
        if self.count == 0 or not self.second:
            raise CompressError("no second moments were taken: there is no Hessian")
        upper = torch.stack([torch.from_numpy(np.triu(sums)) for sums in self.sums]).div_(self.count)
        return upper + upper.mT - torch.diag_embed(upper.diagonal(dim1=1, dim2=2))

    def mean(self) -> Tensor:
        """m, float32 [G, K]."""
        return (self.total / self.count).float()

    def shift(self, change: Tensor) -> Tensor:
        """[C_out] mean of what `change`, like the weight, adds to the outputs: its product with m."""
        moved = (self.split(change) @ self.mean()[:, :, None])[:, :, 0]  # [G, R]
        return moved.unflatten(0, (self.groups, self.blocks)).sum(1).reshape(-1)


def windows(layer: nn.Module, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    """[G, N * P, K]: what the weights of each group of `layer` are multiplied with, at P <= `positions` places.

    The places are drawn anew for each batch and are the same for all its inputs.
    """
    if isinstance(layer, nn.Linear):
        rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]  # [N, T, K]
        return rows[:, _drawn(rows.shape[1], positions, generator)].flatten(0, 1)[None]
    if not isinstance(layer, nn.Conv2d):
        raise CompressError(f"the input windows of a {type(layer).__name__} are not known; known are Conv2d, Linear")
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    reach = [(size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    tall, wide = ((length - far - 1) // step + 1
                  for length, far, step in zip(x.shape[2:], reach, layer.stride, strict=True))
    places = _drawn(tall * wide, positions, generator)
    row, column = (start[:, None] * step + torch.arange(size) * gap for start, step, size, gap in zip(
        (places // wide, places % wide), layer.stride, layer.kernel_size, layer.dilation, strict=True))
    found = x[:, :, row[:, :, None], column[:, None, :]]  # [N, C, P, kh, kw]
    return found.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def _drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    """`most` of 0..count - 1 without repetition, ascending; all where there are no more."""
    return torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most].sort().values
