"""Coordinate descent on codes: error and rate together (QuantEase, Behdin et al. 2023, with an entropy term).

    minimise over the codes q of a layer:   tr((s q - w) H (s q - w)^T) + lam mean(H_ii) s^2 sum bits(q)
    in turn for every input i:  w*_i = q_i - (s q - w) H_:i / (s H_ii)     the code that would cancel the residual
        q_i <- the best of  round(w*_i), one towards 0, 0, and what it was:  H_ii s^2 (q - w*_i)^2 + price of bits(q)

All output channels of a layer share H, so that one step settles a code of each of them. bits follow the codes after
every sweep; within a sweep the objective never rises.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .gptq import spread
from .rates import code_bits

SWEEPS, BLOCK = 3, 128
BEYOND = 2  # codes above and below those that occur that have a price of their own


def descend(codes: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor | float, lam: float = 0.0,
            low: Tensor | float = -torch.inf, high: Tensor | float = torch.inf, mask: Tensor | None = None,
            sweeps: int = SWEEPS) -> Tensor:
    """float32 codes like `codes` [..., R, K] after `sweeps` sweeps from them; other arguments as of `gptq.gptq`.

    lam  price of a bit in units of mean(H_ii) s^2; 0: the error alone

    >>> weight, hessian = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> descend(torch.tensor([[1.0, 1.0]]), weight, hessian, 1.0)
    tensor([[0., 1.]])
    """
    shape, (rows, k) = weight.shape, weight.shape[-2:]
    hessian = hessian.reshape(-1, k, k)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    weight, codes = (part.float().reshape(-1, rows, k).mT for part in (weight, codes))  # [G, K, R]
    kept = (diagonal > 0)[:, :, None].expand_as(weight)
    kept = kept if mask is None else kept & mask.reshape(-1, rows, k).mT
    codes = (codes * kept).contiguous()
    scale, low, high = (spread(value, codes) for value in (scale, low, high))
    residual = codes * scale[:, None] - weight
    price = lam * float(diagonal.mean())
    for _ in range(sweeps):
        first, last = int(codes.min()) - BEYOND, int(codes.max()) + BEYOND
        prices = Prices((price * code_bits(codes, first, last)).numpy(), first)
        for start in range(0, k, BLOCK):
            part = slice(start, start + BLOCK)
            pull = hessian[:, part] @ residual
            _descend_block(codes[:, part].numpy(), residual[:, part].numpy(), pull.numpy(),
                           hessian[:, part, part].numpy(), kept[:, part].numpy(), prices,
                           *(end.numpy() for end in (scale, low, high)))
    return codes.mT.reshape(shape)


@dataclass(frozen=True)
class Prices:
    """price * bits(q) of q = first, first + 1, ...; a code beyond either end costs what that end does."""

    values: np.ndarray
    first: int

    def of(self, codes: np.ndarray) -> np.ndarray:
        if not self.values.any():
            return np.zeros_like(codes)
        return self.values[np.clip(codes - self.first, 0, len(self.values) - 1).astype(np.intp)]


def _descend_block(codes: np.ndarray, residual: np.ndarray, pull: np.ndarray, hessian: np.ndarray, kept: np.ndarray,
                   prices: Prices, scale: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """One sweep over the inputs of a block [G, block, R], in place; pull = H (s q - w) is kept up to date inside it."""
    for i in range(codes.shape[1]):
        now, h = codes[:, i].copy(), hessian[:, i, i, None]
        wanted = now - pull[:, i] / (np.where(h > 0, h, 1) * scale)
        near = np.clip(np.rint(wanted), low, high)
        options = np.stack([now, near, near - np.sign(near), np.zeros_like(near)])
        best = (h * (options - wanted) ** 2 + prices.of(options)).argmin(0)
        best = np.where(kept[:, i], np.take_along_axis(options, best[None], 0)[0], now)
        moved = (best - now) * scale
        codes[:, i] = best
        residual[:, i] += moved
        pull[:, i:] += hessian[:, i:, i, None] * moved[:, None]
