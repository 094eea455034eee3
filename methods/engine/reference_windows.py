"""What a layer sums under SPARQ's bit windows, by their definition, in numpy and int64. Slow.

The reduction is written out, ordered (kernel row, kernel column, input channel), the channel fastest. Neighbours in it
are partners; with 2:4 weights those two of a group of four that the filter has weights at. An activation whose partner
is 0, or that has none, keeps twice the bits at any shift. Nothing here comes from methods/core/windows.py.
"""

import math

import numpy as np
from torch import nn

from ..core.artifact import Window

CODES, WIDTH = 256, 8


def windowed_sums(layer: nn.Module, codes: np.ndarray, integers: np.ndarray, window: Window) -> np.ndarray:
    """int64 sums [N, C_out, ...] of a conv (one group, padded with zeros) or linear over `codes`, 0..255."""
    table = np.array([_shortened(a, window.bits, window.shifts, window.rounding) for a in range(CODES)])
    bits = min(2 * window.bits, WIDTH)
    alone = np.array([_shortened(a, bits, range(WIDTH - bits + 1), window.rounding) for a in range(CODES)])
    columns, shape = _columns(layer, codes, integers.shape)
    rows = np.moveaxis(integers, 1, -1).reshape(len(integers), -1)  # [C_out, K]
    if not window.paired:
        sums = np.einsum("nkl,mk->nml", table[columns], rows)
    elif not window.sparse24:
        columns, rows = _filled(columns, 1, 2), _filled(rows, 1, 2)
        partner = columns.reshape(len(columns), -1, 2, columns.shape[2])[:, :, ::-1].reshape(columns.shape)
        sums = np.einsum("nkl,mk->nml", np.where(partner == 0, alone[columns], table[columns]), rows)
    else:
        columns, rows = _filled(columns, 1, 4), _filled(rows, 1, 4)
        sums = np.stack([_sum_24(columns, row, table, alone) for row in rows], 1)
    return sums.reshape(len(codes), len(integers), *shape)


def _shortened(a: int, bits: int, shifts, rounding: bool) -> int:
    """The code in the lowest window that holds its leading one; to the nearest, ties to even, if rounded."""
    shift = min(s for s in shifts if a < 1 << (s + bits))
    kept = min(round(a / 2**shift), (1 << bits) - 1) if rounding else a >> shift
    return kept << shift


def _sum_24(columns: np.ndarray, row: np.ndarray, table: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """[N, L]: one filter over columns [N, K, L], partners chosen by its weights."""
    total = np.zeros((len(columns), columns.shape[2]), dtype=np.int64)
    for start in range(0, len(row), 4):
        used = [start + i for i in range(4) if row[start + i] != 0]
        for k in used:
            partners = [columns[:, other] for other in used if other != k]
            own, partner = columns[:, k], partners[0] if partners else np.zeros_like(columns[:, k])
            total += row[k] * np.where(partner == 0, alone[own], table[own])
    return total


def _columns(layer: nn.Module, codes: np.ndarray, weight: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """[N, K, L] inputs of every output place, channel fastest in K, and the shape of the places."""
    if isinstance(layer, nn.Linear):
        return codes[:, :, None], ()
    (height, width), stride, dilation = weight[2:], layer.stride, layer.dilation
    reach = [d * (k - 1) for d, k in zip(dilation, (height, width), strict=True)]
    pads = {"valid": [(0, 0), (0, 0)], "same": [(r // 2, r - r // 2) for r in reach]}
    pad = pads[layer.padding] if isinstance(layer.padding, str) else [(p, p) for p in layer.padding]
    padded = np.pad(codes, ((0, 0), (0, 0), *pad))
    out = [(side - r - 1) // s + 1 for side, r, s in zip(padded.shape[2:], reach, stride, strict=True)]
    places = [padded[:, :, i * dilation[0]:i * dilation[0] + (out[0] - 1) * stride[0] + 1:stride[0],
                     j * dilation[1]:j * dilation[1] + (out[1] - 1) * stride[1] + 1:stride[1]]
              for i in range(height) for j in range(width)]
    return np.concatenate(places, 1).reshape(len(codes), -1, out[0] * out[1]), tuple(out)


def _filled(values: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """`values` with zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, -values.shape[axis] % multiple)
    return np.pad(values, widths)


# --- average pools -----------------------------------------------------------------------------------------


def average_windows(pool: nn.Module, codes: np.ndarray) -> tuple[np.ndarray, int] | None:
    """int64 [N, C, H_out, W_out] sums over the windows of a pool, and what every one of them is divided by.

    None where the windows are divided by different numbers.
    """
    found = {}
    sides = [_spans(pool, side, axis) for axis, side in enumerate(codes.shape[2:])]
    sums = np.zeros((*codes.shape[:2], len(sides[0]), len(sides[1])), dtype=np.int64)
    for i, (top, bottom, rows) in enumerate(sides[0]):
        for j, (left, right, columns) in enumerate(sides[1]):
            sums[:, :, i, j] = codes[:, :, top:bottom, left:right].sum((2, 3))
            found[rows * columns] = (i, j)
    divisor = getattr(pool, "divisor_override", None)
    if divisor is not None:
        return sums, divisor
    return (sums, next(iter(found))) if len(found) == 1 else None


def _spans(pool: nn.Module, side: int, axis: int) -> list[tuple[int, int, int]]:
    """[(first, end, values counted)] of the windows along one side, as torch lays them."""
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        out = pool.output_size[axis] if isinstance(pool.output_size, tuple) else pool.output_size
        out = side if out is None else out
        ends = [(i * side // out, math.ceil((i + 1) * side / out)) for i in range(out)]
        return [(first, end, end - first) for first, end in ends]
    kernel, step, pad = (v if isinstance(v, int) else v[axis] for v in (pool.kernel_size, pool.stride, pool.padding))
    rounded = math.ceil if pool.ceil_mode else math.floor
    out = rounded((side + 2 * pad - kernel) / step) + 1
    if pool.ceil_mode and (out - 1) * step >= side + pad:  # a window must start inside the picture or its left padding
        out -= 1
    spans = []
    for start in range(-pad, -pad + out * step, step):
        end = min(start + kernel, side + pad)
        first, last = max(start, 0), min(end, side)
        spans.append((first, last, end - start if pool.count_include_pad else last - first))
    return spans
