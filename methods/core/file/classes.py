"""Where the kept weights of a matrix are, told by how full their row and their column is.

    classes  of each row, of each column (streams); one symbol for each pair of classes that both keep something
             (a stream), varint(bytes), range-coded bits of the pairs, one after the other, row by row

Class 0 is a row or column without kept weights, of which nothing more is said; of the others a class is a band of
counts. The symbol of a pair is 0 where it keeps nothing, 1 where it keeps everything, else 2 + its count of kept
weights rounded to MANTISSA + 1 significant bits: the frequency that its bits are coded with.
"""

from itertools import product

import numpy as np

from ..errors import FormatError
from . import coding
from .streams import Reader, decode_stream, encode_stream, varint

MANTISSA = 2
MAX_CLASSES = 32
BANDS = (1.5, 2.0, 4.0, np.inf)  # ratio of the largest to the smallest count in a class
NONE, ALL, SOME = range(3)
CODERS = ("packed", "range")
SYMBOL_BITS = 6  # of a class or pair in the estimate


def pack_classes(mask: np.ndarray) -> bytes:
    """A mask bool [rows, columns], of which at least one is kept."""
    rows, columns = _choose(mask)
    pairs, symbols, parts = _pairs(rows, columns), [], []
    for a, b in pairs:
        cell = mask[np.ix_(rows == a, columns == b)].reshape(-1)
        kept = int(cell.sum())
        symbols.append(NONE if kept == 0 else ALL if kept == len(cell) else
                       SOME + int(coding.frequency_codes(np.array([kept]), MANTISSA)[0]))
        if symbols[-1] >= SOME:
            parts.append((cell.astype(np.int32), _frequencies(symbols[-1], len(cell))))
    data = coding.range_encode_parts(parts)
    return b"".join([encode_stream(rows, CODERS), encode_stream(columns, CODERS),
                     encode_stream(np.array(symbols, np.int64), CODERS), varint(len(data)), data])


def read_classes(reader: Reader, height: int, width: int) -> np.ndarray:
    """The mask, bool [height, width]."""
    rows, columns = (decode_stream(reader, count)[0] for count in (height, width))
    for classes in (rows, columns):
        if len(classes) and not (0 <= classes.min() and classes.max() < MAX_CLASSES):
            raise FormatError("a row or column has an unknown class")
    pairs = _pairs(rows, columns)
    symbols = decode_stream(reader, len(pairs))[0]
    if len(symbols) and not (0 <= symbols.min() and symbols.max() < 1 << 8):
        raise FormatError("a pair of classes has an impossible count")
    where = [(rows == a, columns == b) for a, b in pairs]
    cells = [int(high.sum()) * int(wide.sum()) for high, wide in where]
    coded = [(cell, _frequencies(int(symbol), cell)) for cell, symbol in zip(cells, symbols, strict=True)
             if symbol >= SOME]
    bits = iter(coding.range_decode_parts(reader.take(reader.varint()), coded))
    mask = np.zeros((height, width), bool)
    for (high, wide), symbol in zip(where, symbols, strict=True):
        if symbol != NONE:
            found = True if symbol == ALL else next(bits).astype(bool).reshape(int(high.sum()), int(wide.sum()))
            mask[np.ix_(high, wide)] = found
    return mask


def _pairs(rows: np.ndarray, columns: np.ndarray) -> list[tuple[int, int]]:
    used = ([one for one in np.unique(classes).tolist() if one] for classes in (rows, columns))
    return list(product(*used))


def _frequencies(symbol: int, cell: int) -> np.ndarray:
    """int64 [2] of pruned and kept weights in a cell of two or more."""
    kept = int(coding.frequencies(np.array([symbol - SOME]), MANTISSA)[0])
    if cell < 2:
        raise FormatError("a pair of classes has an impossible count")
    kept = min(max(kept, 1), cell - 1)
    return np.array([cell - kept, kept], np.int64)


def _choose(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes of rows and columns with the least information, of all pairs of BANDS."""
    counts = mask.sum(1), mask.sum(0)
    best = (np.inf, None, None)
    for row_band in BANDS:
        rows = _banded(counts[0], row_band)
        by_row = np.stack([mask[rows == one].sum(0) for one in range(rows.max() + 1)])
        for column_band in BANDS:
            columns = _banded(counts[1], column_band)
            kept = np.stack([by_row[:, columns == one].sum(1) for one in range(columns.max() + 1)], axis=1)
            cells = np.outer(np.bincount(rows, minlength=len(kept)), np.bincount(columns, minlength=kept.shape[1]))
            bits = (sum(coding.entropy(c) * len(c) + SYMBOL_BITS * (c.max() + 1) for c in (rows, columns))
                    + _information(kept[1:, 1:], cells[1:, 1:]))
            if bits < best[0]:
                best = bits, rows, columns
    return best[1:]


def _banded(counts: np.ndarray, band: float) -> np.ndarray:
    """Class of each count: 0 for 0; else by bands, numbered without holes where there are few."""
    if np.isinf(band):
        return (counts > 0).astype(np.int64)
    classes = 1 + np.floor(np.log(np.maximum(counts, 1)) / np.log(band)).astype(np.int64)
    kept = np.unique(classes[counts > 0])
    return np.where(counts > 0, np.minimum(1 + np.searchsorted(kept, classes), MAX_CLASSES - 1), 0)


def _information(kept: np.ndarray, cells: np.ndarray) -> float:
    """Bits of the masks of all pairs and of their symbols."""
    share = np.divide(kept, cells, out=np.zeros(kept.shape), where=cells > 0)
    inside = (share > 0) & (share < 1)
    p = share[inside]
    return float((cells[inside] * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))).sum() + SYMBOL_BITS * kept.size)
