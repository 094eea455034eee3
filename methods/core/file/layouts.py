"""One compressed tensor as bytes: grid, layout, streams.

    grid    kind and flags[1], then  scale, zero points | scale, number of levels, levels | number of values, values;
            scale and values in 16 bits, as a flag says, where that gives the same bits back
    layout  code[1], then  dense: values | mask: bits, values of the kept | gap: entries, skipped zeros, their values
            | classed: the mask by classes of rows and columns (classes.py), values of the kept

A value is what a code means, with one integer for "pruned": code - zero on an affine grid; on any other grid the
code itself, where the index of the zero, or -1 if there is none, means pruned.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import FormatError
from . import coding
from .classes import read_classes
from .streams import Reader, decode_stream

INDEX_BITS = range(1, 17)  # widths of a relative position
AUTO = range(2, 9)  # those worth trying
CODERS = {"paper": ("packed", "huffman"), "best": ("packed", "huffman", "range")}
DENSE, MASK, ROWS, COLUMNS = range(4)  # layouts; the gap layouts ROWS and COLUMNS add their index bits << 2
CLASSED = MASK | 1 << 2
AFFINE, LEVELS, CODEBOOK = range(3)  # kinds of grid, to which these flags are added:
PER_CHANNEL, HAS_ZEROS, UNSIGNED, HALF, BRAIN = 4, 8, 16, 32, 64
GRIDS = ("affine", "levels", "codebook")
TABLE_BITS = 6  # of a code table per symbol, roughly
MAX_GRID = 1 << 20  # levels of a grid


@dataclass(frozen=True)
class Layer:
    """Bytes of one tensor."""

    codes: int
    positions: int
    codebook: int


@dataclass(frozen=True, eq=False)
class StoredGrid:
    """A grid as a file holds it: its kind, float32 scale [] or [C] or values [K], and int64 zero points or levels."""

    kind: int
    numbers: np.ndarray
    integers: np.ndarray
    signed: bool = True

    @property
    def pruned(self) -> int:
        """The value that means pruned."""
        if self.kind == AFFINE:
            return 0
        zeros = np.flatnonzero((self.integers if self.kind == LEVELS else self.numbers) == 0)
        return int(zeros[0]) if len(zeros) else -1


@dataclass(frozen=True, eq=False)
class Block:
    """One tensor as a file holds it: values int64 [n], its grid, what its bytes are for, names of its coders."""

    values: np.ndarray
    grid: StoredGrid
    layer: Layer
    coder: str


def read_block(reader: Reader, shape: list[int]) -> Block:
    start, n = reader.at, int(np.prod(shape, dtype=np.int64))
    grid = _read_grid(reader, shape[0])
    grid_end, layout = reader.at, reader.take(1)[0]
    if layout == CLASSED:
        values, where_end, coder = _read_classed(reader, shape[0], n, grid.pruned)
    else:
        read = (_read_dense, _read_mask, _read_gaps, _read_gaps)[layout & 3]
        values, where_end, coder = read(reader, n, grid.pruned, layout >> 2)
    if layout & 3 == COLUMNS:
        values, coder = values.reshape(-1, max(shape[0], 1)).T.reshape(-1), f"{coder}, by column"
    sizes = grid_end - start, where_end - grid_end, reader.at - where_end
    return Block(values, grid, layer_of(layout, *sizes, values != grid.pruned), coder)


def layer_of(layout: int, grid: int, where: int, what: int, mask: np.ndarray) -> Layer:
    inside = min(round(len(mask) * coding.entropy(mask.astype(np.int8)) / 8), what) if layout == DENSE else 0
    return Layer(what - inside, where + inside, grid)


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


# --- grids -------------------------------------------------------------------------------------------------


def _read_grid(reader: Reader, channels: int) -> StoredGrid:
    head = reader.take(1)[0]
    kind, flags, width = head & 3, head & ~(3 | HALF | BRAIN), head & (HALF | BRAIN)
    allowed = {CODEBOOK: 0, LEVELS: PER_CHANNEL, AFFINE: PER_CHANNEL | HAS_ZEROS | UNSIGNED}
    if width == HALF | BRAIN or kind not in allowed or flags & ~allowed[kind]:
        raise FormatError(f"unknown kind of grid {head}")
    nothing = np.zeros(0, np.int64)
    if kind == CODEBOOK:
        return StoredGrid(kind, _read_floats(reader, (reader.varint(),), width), nothing)
    scale = _read_floats(reader, (channels,) if flags & PER_CHANNEL else (), width)
    if kind == LEVELS:
        return StoredGrid(kind, scale, _read_int32(reader, reader.varint()))
    zero = _read_int32(reader, scale.size) if flags & HAS_ZEROS else np.zeros(scale.size, np.int64)
    return StoredGrid(kind, scale, zero.reshape(scale.shape), not flags & UNSIGNED)


def _read_floats(reader: Reader, shape: tuple[int, ...], width: int) -> np.ndarray:
    stored = {0: "<f4", HALF: "<f2", BRAIN: "<u2"}[width]
    numbers = np.frombuffer(reader.take(np.dtype(stored).itemsize * int(np.prod(shape, dtype=np.int64))), stored)
    if width == BRAIN:  # the upper half of a float32
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32).reshape(shape)


def _read_int32(reader: Reader, count: int) -> np.ndarray:
    if count > MAX_GRID:  # a constant stream takes no bytes per number
        raise FormatError("a grid has too many values")
    numbers = decode_stream(reader, count)[0]
    if not (numbers == numbers.astype(np.int32)).all():
        raise FormatError("a grid holds a number beyond 32 bits")
    return numbers
