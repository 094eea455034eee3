"""One compressed tensor as bytes: grid, layout, streams.

    grid    kind and flags[1], then  scale, zero points | scale, number of levels, levels | number of values, values;
            scale and values in 16 bits, as a flag says, where that gives the same bits back
    layout  code[1], then  dense: values | mask: bits, values of the kept | gap: entries, skipped zeros, their values
            | classed: the mask by classes of rows and columns (classes.py), values of the kept

A value is what a code means, with one integer for "pruned": code - zero on an affine grid; on any other grid the
code itself, where the index of the zero, or -1 if there is none, means pruned.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..artifact import Affine, Codebook, CompressedTensor, Grid, Levels
from ..errors import FormatError
from . import coding
from .classes import pack_classes, read_classes
from .rest import bits_of, narrowest, tensor_of
from .streams import Reader, decode_stream, encode_stream, varint

INDEX_BITS = range(1, 17)  # widths of a relative position
AUTO = range(2, 9)  # those worth trying
CODERS = {"paper": ("packed", "huffman"), "best": ("packed", "huffman", "range")}
DENSE, MASK, ROWS, COLUMNS = range(4)  # layouts; the gap layouts ROWS and COLUMNS add their index bits << 2
CLASSED = MASK | 1 << 2
AFFINE, LEVELS, CODEBOOK = range(3)  # kinds of grid, to which these flags are added:
PER_CHANNEL, HAS_ZEROS, UNSIGNED, HALF, BRAIN = 4, 8, 16, 32, 64
STORED = {torch.float32: 0, torch.float16: HALF, torch.bfloat16: BRAIN}  # how scale and values are stored: a flag
TABLE_BITS = 6  # of a code table per symbol, roughly
MAX_GRID = 1 << 20  # levels of a grid


@dataclass(frozen=True)
class Layer:
    """Bytes of one tensor."""

    codes: int
    positions: int
    codebook: int


def pack_tensor(tensor: CompressedTensor, mode: str, widths: list[int]) -> tuple[bytes, Layer]:
    values, pruned = values_of(tensor)
    grid = _pack_grid(tensor.grid, mode)
    where, what = min(_candidates(values, pruned, tensor.codes.shape[0], mode, widths),
                      key=lambda option: len(option[0]) + len(option[1]))
    return grid + where + what, _layer(where[0], len(grid), len(where), len(what), values != pruned)


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


def _layer(layout: int, grid: int, where: int, what: int, mask: np.ndarray) -> Layer:
    inside = min(round(len(mask) * coding.entropy(mask.astype(np.int8)) / 8), what) if layout == DENSE else 0
    return Layer(what - inside, where + inside, grid)


def read_tensor(reader: Reader, shape: list[int], bits: int) -> tuple[CompressedTensor, Layer, str]:
    start, n = reader.at, int(np.prod(shape, dtype=np.int64))
    grid = _read_grid(reader, shape[0])
    grid_end, layout = reader.at, reader.take(1)[0]
    if layout == CLASSED:
        values, where_end, coder = _read_classed(reader, shape[0], n, _pruned_value(grid))
    else:
        read = (_read_dense, _read_mask, _read_gaps, _read_gaps)[layout & 3]
        values, where_end, coder = read(reader, n, _pruned_value(grid), layout >> 2)
    if layout & 3 == COLUMNS:
        values, coder = values.reshape(-1, max(shape[0], 1)).T.reshape(-1), f"{coder}, by column"
    tensor = _tensor(values, grid, shape, bits)
    sizes = grid_end - start, where_end - grid_end, reader.at - where_end
    return tensor, _layer(layout, *sizes, tensor.mask.numpy().reshape(-1)), coder


def _read_dense(reader: Reader, n: int, pruned: int, width: int) -> tuple[np.ndarray, int, str]:
    """(values int64 [n], where the positions end, name of the coder); so do the next two."""
    if width != 0:
        raise FormatError("a tensor has an unknown layout")
    end = reader.at
    values, coder = decode_stream(reader, n)
    return values, end, f"dense: {coder}"


def _read_mask(reader: Reader, n: int, pruned: int, width: int) -> tuple[np.ndarray, int, str]:
    bits, first = decode_stream(reader, n)
    if width != 0 or not ((bits == 0) | (bits == 1)).all():
        raise FormatError("a mask holds something else than bits")
    mask, end = bits.astype(bool), reader.at
    kept, second = decode_stream(reader, int(mask.sum()))
    values = np.full(n, pruned, np.int64)
    values[mask] = kept
    return values, end, f"mask: {first} + {second}"


def _read_classed(reader: Reader, height: int, n: int, pruned: int) -> tuple[np.ndarray, int, str]:
    if n == 0:
        raise FormatError("a tensor without weights has classes of rows")
    mask = read_classes(reader, height, n // height).reshape(-1)
    end = reader.at
    kept, coder = decode_stream(reader, int(mask.sum()))
    values = np.full(n, pruned, np.int64)
    values[mask] = kept
    return values, end, f"classes + {coder}"


def _read_gaps(reader: Reader, n: int, pruned: int, width: int) -> tuple[np.ndarray, int, str]:
    entries = reader.varint()
    if width not in INDEX_BITS or entries > n:
        raise FormatError("a tensor has an unknown layout or too many entries")
    symbols, first = decode_stream(reader, entries)
    if not ((symbols >= 0) & (symbols < 1 << width)).all():
        raise FormatError("a relative position is out of range")
    positions, end = coding.gap_decode(symbols), reader.at
    if entries and positions[-1] >= n:
        raise FormatError("a position lies outside its tensor")
    stored, second = decode_stream(reader, entries)
    values = np.full(n, pruned, np.int64)
    values[positions] = stored
    return values, end, f"gap {width}: {first} + {second}"


# --- values and grids --------------------------------------------------------------------------------------


def _pruned_value(grid: Grid) -> int:
    if isinstance(grid, Affine):
        return 0
    return int(grid.zero_codes(torch.zeros(1, dtype=torch.int32))) if grid.has_zero() else -1


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


def _read_grid(reader: Reader, channels: int) -> Grid:
    head = reader.take(1)[0]
    kind, flags, width = head & 3, head & ~(3 | HALF | BRAIN), head & (HALF | BRAIN)
    found = [dtype for dtype, flag in STORED.items() if flag == width]
    allowed = {CODEBOOK: 0, LEVELS: PER_CHANNEL, AFFINE: PER_CHANNEL | HAS_ZEROS | UNSIGNED}
    if not found or kind not in allowed or flags & ~allowed[kind]:
        raise FormatError(f"unknown kind of grid {head}")
    if kind == CODEBOOK:
        return Codebook(_read_floats(reader, (reader.varint(),), found[0]))
    scale = _read_floats(reader, (channels,) if flags & PER_CHANNEL else (), found[0])
    if kind == LEVELS:
        return Levels(scale, _read_int32(reader, reader.varint()))
    zero = _read_int32(reader, scale.numel()) if flags & HAS_ZEROS else torch.zeros(scale.numel(), dtype=torch.int32)
    return Affine(scale, zero.reshape(scale.shape), not flags & UNSIGNED)


def _floats(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    return bits_of(tensor.detach().cpu().reshape(-1).to(dtype)).tobytes()


def _read_floats(reader: Reader, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    data = np.frombuffer(reader.take(dtype.itemsize * count), f"<i{dtype.itemsize}")
    return tensor_of(data, dtype).to(torch.float32).reshape(shape)


def _read_int32(reader: Reader, count: int) -> torch.Tensor:
    if count > MAX_GRID:  # a constant stream takes no bytes per number
        raise FormatError("a grid has too many values")
    numbers = decode_stream(reader, count)[0]
    if not (numbers == numbers.astype(np.int32)).all():
        raise FormatError("a grid holds a number beyond 32 bits")
    return torch.from_numpy(numbers.astype(np.int32))
