"""The windows of average pools: integer sums need them to be of one size."""

import torch
from torch import nn


def has_even_windows(pool: nn.Module | None, shape: torch.Size) -> bool:
    """Whether all windows of an average pool over pictures of `shape` [..., H, W] hold equally many values.

    pool  AvgPool2d, AdaptiveAvgPool2d, or None for a mean over whole dimensions
    """
    if isinstance(pool, nn.AvgPool2d):
        padded = any(pair(pool.padding)) and not pool.count_include_pad
        sides = zip(shape[-2:], pair(pool.padding), pair(pool.kernel_size), pair(pool.stride), strict=True)
        beyond = pool.ceil_mode and any((size + 2 * pad - kernel) % step for size, pad, kernel, step in sides)
        return pool.divisor_override is not None or not (padded or beyond)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        wanted = zip(shape[-2:], pair(pool.output_size), strict=True)
        return all(len({-(-(i + 1) * size // out) - i * size // out for i in range(out)}) == 1
                   for size, out in wanted if out is not None)
    return True


def window_size(pool: nn.Module | None, before: torch.Size, after: torch.Size) -> int:
    """What the sum over a window is divided by, where the windows are even; shapes of input and output."""
    if isinstance(pool, nn.AvgPool2d):
        height, width = pair(pool.kernel_size)
        return height * width if pool.divisor_override is None else pool.divisor_override
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        (height, width), (rows, columns) = before[-2:], after[-2:]
        return -(-height // rows) * -(-width // columns)
    return before.numel() // after.numel()


def pair(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
