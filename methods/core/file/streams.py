"""Streams of integers that describe themselves, and the checked reading of bytes.

    stream  head[1] = coder | parameter << 2, then zigzag(lowest symbol) and what the coder needs; how many
            symbols there are is known from outside, and a stream of none is no bytes at all
"""

from collections.abc import Collection

import numpy as np

from ..errors import FormatError
from . import coding

CODERS = ("constant", "packed", "range", "huffman")
MAX_WIDTH = 40  # bits of a packed symbol
SLACK = 16  # bytes by which a range-coded stream may come out shorter than its information

# --- reading and writing numbers ---------------------------------------------------------------------------


class Reader:
    """A cursor over bytes; what is not there raises FormatError."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise FormatError("the content ends too early")
        self.at += count
        return self.data[self.at - count:self.at]

    def varint(self) -> int:
        """An unsigned number below 2^56, 7 bits a byte, lowest first."""
        value = 0
        for place in range(8):
            byte = self.take(1)[0]
            value |= (byte & 127) << 7 * place
            if byte < 128:
                return value
        raise FormatError("a number is too long")

    def signed(self) -> int:
        """A zigzag number: 0, -1, 1, -2, …"""
        value = self.varint()
        return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)

    def left(self) -> int:
        return len(self.data) - self.at


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def signed(value: int) -> bytes:
    return varint(2 * value if value >= 0 else -2 * value - 1)


# --- streams -----------------------------------------------------------------------------------------------


def encode_stream(symbols: np.ndarray, coders: Collection[str]) -> bytes:
    """Integers [count] by whichever of `coders` gives the fewest bytes, tables included.

    A stream of one distinct symbol is "constant" and one with a range above MAX_ALPHABET "packed", whatever
    `coders` says.
    """
    if len(symbols) == 0:
        return b""
    low, span = int(symbols.min()), int(symbols.max()) - int(symbols.min()) + 1
    if span == 1:
        return _head("constant", 0, low)
    width = (span - 1).bit_length()
    smallest, size = None, coding.packed_size(len(symbols), width)
    if span <= coding.MAX_ALPHABET and tuple(coders) != ("packed",):
        shifted = (symbols - low).astype(np.int32)
        counts = np.bincount(shifted, minlength=span)
        body = _range_body(shifted, counts, size) if "range" in coders else None
        if body is not None:
            smallest, size = _head("range", body[0], low) + body[1], len(body[1])
        body = _huffman_body(shifted, counts, size) if "huffman" in coders else None
        if body is not None:
            smallest = _head("huffman", 0, low) + body
    if smallest is None:
        smallest = _head("packed", width, low) + coding.pack_bits(symbols - low, width)
    return smallest


def _head(coder: str, parameter: int, low: int) -> bytes:
    return bytes([CODERS.index(coder) | parameter << 2]) + signed(low)


def _range_body(symbols: np.ndarray, counts: np.ndarray, limit: int) -> tuple[int, bytes] | None:
    """(head parameter: precision | exponent bits << 3, body: alphabet, frequencies, length, data).

    None if not below `limit` bytes, which is known before the coding where the symbols are nearly uniform.
    """
    bits, place, width, codes = coding.fit_frequencies(counts)
    if bits / 8 > limit + SLACK:
        return None
    mantissa = coding.MANTISSAS[place]
    data = coding.range_encode(symbols, coding.frequencies(codes, mantissa))
    table = coding.pack_bits(codes, width)
    body = varint(len(counts)) + table + varint(len(data)) + data
    return (place | width - mantissa << 3, body) if len(body) < limit else None


def _huffman_body(symbols: np.ndarray, counts: np.ndarray, limit: int) -> bytes | None:
    """Alphabet, code lengths, length, data; None if not below `limit` bytes or if a code is too long."""
    lengths = coding.code_lengths(counts)
    length = coding.packed_size(int(counts @ lengths), 1)
    if lengths.max() > coding.MAX_DEPTH:
        return None
    table = varint(len(counts)) + coding.pack_bits(lengths, coding.LENGTH_BITS) + varint(length)
    return table + coding.huffman_encode(symbols, lengths) if len(table) + length < limit else None


def decode_stream(reader: Reader, count: int) -> tuple[np.ndarray, str]:
    """(symbols int64 [count], name of the coder); "empty" where count is 0."""
    if count == 0:
        return np.zeros(0, np.int64), "empty"
    head = reader.take(1)[0]
    coder, parameter, low = CODERS[head & 3], head >> 2, reader.signed()
    symbols = _DECODE[coder](reader, parameter, count)
    symbols += low
    return symbols, coder


def _constant(reader: Reader, parameter: int, count: int) -> np.ndarray:
    return np.zeros(count, np.int64)


def _packed(reader: Reader, parameter: int, count: int) -> np.ndarray:
    if not 1 <= parameter <= MAX_WIDTH:
        raise FormatError(f"{parameter}-bit symbols are not allowed")
    return coding.unpack_bits(reader.take(coding.packed_size(count, parameter)), parameter, count)


def _table(reader: Reader, width: int) -> np.ndarray:
    alphabet = reader.varint()
    if not 2 <= alphabet <= coding.MAX_ALPHABET or not 1 <= width <= 31:
        raise FormatError("a code table has an impossible size")
    return coding.unpack_bits(reader.take(coding.packed_size(alphabet, width)), width, alphabet)


def _range(reader: Reader, parameter: int, count: int) -> np.ndarray:
    mantissa = coding.MANTISSAS[parameter & 7]
    codes = _table(reader, mantissa + (parameter >> 3))
    if int(codes.max()) >> mantissa > 40:
        raise FormatError("a frequency is too large")
    return coding.range_decode(reader.take(reader.varint()), coding.frequencies(codes, mantissa), count)


def _huffman(reader: Reader, parameter: int, count: int) -> np.ndarray:
    lengths = _table(reader, coding.LENGTH_BITS)
    return coding.huffman_decode(reader.take(reader.varint()), lengths, count)


_DECODE = {"constant": _constant, "packed": _packed, "range": _range, "huffman": _huffman}
