"""Layers with weights of more than 9 bits, on the int8 kernels: one call for each digit of the weights.

Digits are powers of two apart, and the sums of each are exact in float32. So of two digits the sum is rounded once, as
f32(acc) is by definition; of three it is taken in float64.
"""

import torch
from torch import Tensor, nn

from . import onednn
from .accumulate import EXACT, largest_partial_sum
from .onednn import Int8Layer

DIGITS = (8, 6, 4)  # bits of the digits that wide weights are split into
HIGHEST = 255  # of the highest digit
CHUNK = 1 << 18  # float32 numbers of a sum, few enough to stay in the caches


class DigitLayer:
    """Like `Int8Layer`: f32(acc) * factor + offset, for integers of any width that `digits_of` splits."""

    adds_codes = False

    def __init__(self, module: nn.Module, integers: Tensor, zero: int, factor: Tensor, offset: Tensor):
        noughts = torch.zeros_like(offset)
        self.kernels = [Int8Layer(module, plane, zero, torch.full_like(factor, scale), noughts)
                        for scale, plane in digits_of(integers)]
        self.products = sum(kernel.products for kernel in self.kernels)
        shape = (1, -1, *[1] * (integers.ndim - 2))
        self.factor, self.offset = factor.reshape(shape), offset.reshape(shape)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype` float32, or rounded half to even and saturated in uint8 or int8; 4-d outputs channels_last."""
        pictures = max(1, CHUNK // max(1, torch.Size(self.output_shape(x)[1:]).numel()))
        if dtype == torch.float32 or len(x) <= pictures:
            return self._scaled(x, dtype)
        return torch.cat([self._scaled(x[start:start + pictures], dtype) for start in range(0, len(x), pictures)])

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.kernels[0].output_shape(x)

    def _scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return onednn.saturated(self._sums(x).mul_(self.factor).add_(self.offset), dtype)

    def _sums(self, x: Tensor) -> Tensor:
        """f32(acc)."""
        if len(self.kernels) > 2:
            return sum(kernel(x, torch.float32).double() for kernel in self.kernels).float()
        low, high = self.kernels[0], self.kernels[-1]
        y = high(x, torch.float32)
        if high is low:
            return y
        return low.add_float(y, x) if low.adds_codes else y.add_(low(x, torch.float32))


def digits_of(integers: Tensor) -> list[tuple[int, Tensor]]:
    """[(factor, digits)] with integers = sum of factor * digits, digits whose sums are exact in float32.

    Of 8 bits, the highest of 9 where that saves one more. The least factor first; empty where that takes digits of
    fewer bits than DIGITS has.
    """
    for bits in DIGITS:
        base, rest, planes = 1 << bits, integers.to(torch.int64), []
        while bool((rest != 0).any()) or not planes:
            last = bool((rest.abs() <= HIGHEST).all()) and bits == DIGITS[0]
            digits = rest if last else (rest + base // 2) % base - base // 2
            planes.append((base ** len(planes), digits))
            rest = (rest - digits) // base
        if all(largest_partial_sum(digits, 0, 255) <= EXACT[torch.float32] for _, digits in planes):
            return planes
    return []


def find_kernel(module: nn.Module, integers: Tensor, bits: int) -> type[Int8Layer] | type[DigitLayer] | None:
    """What computes a layer with codes of so many bits on the int8 instructions, if anything."""
    if onednn.takes(module, integers, bits):
        return Int8Layer
    digits = digits_of(integers)
    fits = bool(digits) and all(onednn.takes(module, plane, bits) for _, plane in digits)
    return DigitLayer if fits else None
