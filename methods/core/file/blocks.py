"""Compressed tensors to and from the blocks of layouts.py: choosing the smallest layout, and rebuilding grids."""

from collections.abc import Iterator

import numpy as np
import torch

from ..artifact import Affine, Codebook, CompressedTensor, Grid, Levels
from ..errors import FormatError
from . import coding
from .classes import pack_classes
from .layouts import (
    AFFINE,
    AUTO,
    BRAIN,
    CLASSED,
    CODEBOOK,
    CODERS,
    COLUMNS,
    DENSE,
    HALF,
    HAS_ZEROS,
    LEVELS,
    MASK,
    PER_CHANNEL,
    ROWS,
    TABLE_BITS,
    UNSIGNED,
    Layer,
    StoredGrid,
    layer_of,
    read_block,
)
from .rest import bits_of, narrowest
from .streams import Reader, encode_stream, varint

STORED = {torch.float32: 0, torch.float16: HALF, torch.bfloat16: BRAIN}  # how scale and values are stored: a flag


def pack_tensor(tensor: CompressedTensor, mode: str, widths: list[int]) -> tuple[bytes, Layer]:
    values, pruned = values_of(tensor)
    grid = _pack_grid(tensor.grid, mode)
    where, what = min(_candidates(values, pruned, tensor.codes.shape[0], mode, widths),
                      key=lambda option: len(option[0]) + len(option[1]))
    return grid + where + what, layer_of(where[0], len(grid), len(where), len(what), values != pruned)


def _candidates(values: np.ndarray, pruned: int, channels: int, mode: str, widths: list[int]
                ) -> Iterator[tuple[bytes, bytes]]:
    """(bytes that say where, bytes that say what) in the layouts that `mode` allows."""
    coders = CODERS[mode]
    if mode == "paper":
        for width in widths:
            yield _gaps(values, pruned, ROWS, width, coders)
        return
    mask = values != pruned
    yield bytes([DENSE]), encode_stream(values, coders)
    yield bytes([MASK]) + encode_stream(mask.astype(np.int32), coders), encode_stream(values[mask], coders)
    if mask.any() and not mask.all():
        rows = mask.reshape(channels, -1)
        yield bytes([CLASSED]) + pack_classes(rows), encode_stream(values[mask], coders)
    orders = {ROWS: values, COLUMNS: values.reshape(max(channels, 1), -1).T.reshape(-1)}
    layout, width = _best_gaps(orders, pruned, sorted({*AUTO, *widths}))
    yield _gaps(orders[layout], pruned, layout, width, coders)


def _best_gaps(orders: dict[int, np.ndarray], pruned: int, widths: list[int]) -> tuple[int, int]:
    """(layout, width) of the gaps with the least zero-order information, and TABLE_BITS for each symbol in use.

    An estimate, because to encode them all takes too long.
    """
    def bits(counts: np.ndarray) -> float:
        counts = counts[counts > 0]
        return float((counts * np.log2(counts.sum() / counts)).sum()) + TABLE_BITS * len(counts)

    estimates, kept = [], coding.histogram(orders[ROWS][orders[ROWS] != pruned])[1]
    for layout, order in orders.items():
        runs = np.diff(np.flatnonzero(order != pruned), prepend=-1) - 1
        for width in widths:
            symbols, fillers = np.bincount(runs & (1 << width) - 1, minlength=1 << width), (runs >> width).sum()
            symbols[-1] += fillers
            estimates.append((bits(symbols) + bits(np.append(kept, fillers)), layout, width))
    return min(estimates)[1:]


def _gaps(order: np.ndarray, pruned: int, layout: int, width: int, coders: tuple[str, ...]) -> tuple[bytes, bytes]:
    mask = order != pruned
    symbols, is_filler = coding.gap_encode(mask, width)
    entries = np.full(len(symbols), pruned, order.dtype)
    entries[~is_filler] = order[mask]
    where = bytes([layout | width << 2]) + varint(len(symbols)) + encode_stream(symbols, coders)
    return where, encode_stream(entries, coders)


def read_tensor(reader: Reader, shape: list[int], bits: int) -> CompressedTensor:
    block = read_block(reader, shape)
    return _tensor(block.values, _grid(block.grid), shape, bits)


# --- values and grids --------------------------------------------------------------------------------------


def _pruned_value(grid: Grid) -> int:
    if isinstance(grid, Affine):
        return 0
    return int(grid.zero_codes(torch.zeros(1, dtype=torch.int32))) if grid.has_zero() else -1


def _grid(stored: StoredGrid) -> Grid:
    numbers, integers = torch.from_numpy(stored.numbers), torch.from_numpy(stored.integers.astype(np.int32))
    if stored.kind == CODEBOOK:
        return Codebook(numbers)
    return Levels(numbers, integers) if stored.kind == LEVELS else Affine(numbers, integers, stored.signed)


def values_of(tensor: CompressedTensor) -> tuple[np.ndarray, int]:
    """(values int [n], the value that means pruned)."""
    codes, mask = (part.cpu().numpy().reshape(-1) for part in (tensor.codes, tensor.mask))
    if isinstance(tensor.grid, Affine) and bool(tensor.grid.zero.any()):
        zero = tensor.grid.zero.cpu().numpy().astype(np.int64)
        codes = (codes.reshape(zero.size, -1) - zero.reshape(-1, 1)).reshape(-1)
    pruned = _pruned_value(tensor.grid)
    return np.where(mask, codes, pruned), pruned


def _tensor(values: np.ndarray, grid: Grid, shape: list[int], bits: int) -> CompressedTensor:
    """The inverse of `values_of`."""
    pruned = _pruned_value(grid)
    mask = values != pruned
    if isinstance(grid, Affine) and bool(grid.zero.any()):
        zero = grid.zero.numpy().astype(np.int64)
        values = (values.reshape(zero.size, -1) + zero.reshape(-1, 1)).reshape(-1)
    elif pruned < 0:
        values = np.where(mask, values, 0)  # the code at pruned positions of a grid without a zero
    low, high = grid.code_range(bits)
    if len(values) and not (low <= values.min() and values.max() <= high):
        raise FormatError(f"codes {values.min()}..{values.max()} leave the grid's range {low}..{high}")
    return CompressedTensor(torch.from_numpy(mask).reshape(shape),
                            torch.from_numpy(values.astype(np.int32)).reshape(shape), grid, bits)


def _pack_grid(grid: Grid, mode: str) -> bytes:
    coders, numbers = CODERS[mode], grid.values if isinstance(grid, Codebook) else grid.scale
    dtype = narrowest(numbers.detach().cpu()) if mode == "best" else torch.float32
    flags, numbers = STORED[dtype], _floats(numbers, dtype)
    if isinstance(grid, Codebook):
        return bytes([CODEBOOK | flags]) + varint(len(grid.values)) + numbers
    flags |= PER_CHANNEL if grid.scale.ndim else 0
    if isinstance(grid, Levels):
        levels = encode_stream(grid.levels.cpu().numpy(), coders)
        return bytes([LEVELS | flags]) + numbers + varint(len(grid.levels)) + levels
    zeros = b""
    if bool(grid.zero.any()):
        zeros, flags = encode_stream(grid.zero.cpu().numpy().reshape(-1), coders), flags | HAS_ZEROS
    return bytes([AFFINE | flags | (0 if grid.signed else UNSIGNED)]) + numbers + zeros


def _floats(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    return bits_of(tensor.detach().cpu().reshape(-1).to(dtype)).tobytes()
