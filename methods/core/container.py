"""The bytes around the content: frame and checksum, checked reading, streams of integers, safe writing.

    file    magic[4] version[1] mode[1] varint(header length) header payload blake2b[8]
    header  JSON without floats, deflated with a preset dictionary
    stream  head[1] = coder | parameter << 2, then zigzag(lowest symbol) and what the coder needs; how many
            symbols there are is known from outside, and a stream of none is no bytes at all
"""

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

import numpy as np

from . import coding
from .errors import CompressError, FormatError

MAGIC = b"\x8aJCM"
VERSION = 1
MODES = ("paper", "best")
CODERS = ("constant", "packed", "range", "huffman")
DIGEST_BYTES = 8
MAX_HEADER = 1 << 21  # bytes of JSON
FEW_ELEMENTS = 1 << 24  # a file of any size may hold this many elements; beyond, so many per byte:
ELEMENTS_PER_BYTE = 1 << 16
PRESET = (b'":{"float16""bfloat16""int64"[1],[512],[128,128,3,3],[256,256,3,3],[64,64,3,3],[10],"layer4.2.'
          b'layer3.1.layer2.0.layer1.0.downsample.1.blocks.0.features.0.classifier.head.shortcut.0.conv3.bn3.'
          b'conv2.conv1.bn2.bn1.fc3.fc2.fc1.fc.running_mean",[running_var",[weight",[bias",[{"w":[["conv1",[')


def max_elements(file_bytes: int) -> int:
    """Tensor elements that a file of this size may declare: a tiny file cannot ask for all memory."""
    return max(FEW_ELEMENTS, ELEMENTS_PER_BYTE * file_bytes)


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
    if span <= coding.MAX_ALPHABET:
        shifted = (symbols - low).astype(np.int32)
        counts = np.bincount(shifted, minlength=span)
        body = _range_body(shifted, counts) if "range" in coders else None
        if body is not None and len(body[1]) < size:
            smallest, size = _head("range", body[0], low) + body[1], len(body[1])
        body = _huffman_body(shifted, counts, size) if "huffman" in coders else None
        if body is not None:
            smallest = _head("huffman", 0, low) + body
    if smallest is None:
        smallest = _head("packed", width, low) + coding.pack_bits(symbols - low, width)
    return smallest


def _head(coder: str, parameter: int, low: int) -> bytes:
    return bytes([CODERS.index(coder) | parameter << 2]) + signed(low)


def _range_body(symbols: np.ndarray, counts: np.ndarray) -> tuple[int, bytes]:
    """(head parameter: precision | exponent bits << 3, body: alphabet, frequencies, length, data)."""
    place, width, codes = coding.fit_frequencies(counts)
    mantissa = coding.MANTISSAS[place]
    data = coding.range_encode(symbols, coding.frequencies(codes, mantissa))
    table = coding.pack_bits(codes, width)
    return place | width - mantissa << 3, varint(len(counts)) + table + varint(len(data)) + data


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
    return _DECODE[coder](reader, parameter, count) + low, coder


def _constant(reader: Reader, parameter: int, count: int) -> np.ndarray:
    return np.zeros(count, np.int64)


def _packed(reader: Reader, parameter: int, count: int) -> np.ndarray:
    if not 1 <= parameter <= 40:
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


# --- JSON parts --------------------------------------------------------------------------------------------


def deflate(value: object, preset: bytes) -> bytes:
    """JSON `value`, compact and compressed; `preset` holds text that it may repeat for free."""
    text = json_bytes(value)
    if len(text) > MAX_HEADER:
        raise CompressError(f"the names and shapes take {len(text)} bytes; a file holds at most {MAX_HEADER}")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, preset)
    return packer.compress(text) + packer.flush()


def json_bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def inflate(blob: bytes, preset: bytes) -> object:
    """The inverse of `deflate`; FormatError for anything that is not bounded JSON without floats."""
    unpacker = zlib.decompressobj(-15, preset)
    try:
        text = unpacker.decompress(blob, MAX_HEADER + 1)
        if len(text) > MAX_HEADER or not unpacker.eof or unpacker.unused_data:
            raise FormatError("the header has a wrong length")
        return json.loads(text.decode("ascii"), parse_float=_no_float, parse_constant=_no_float)
    except FormatError:
        raise
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"the header cannot be read ({type(error).__name__})") from None


def _no_float(text: str) -> None:
    raise FormatError("the header holds a number that is not an integer")


# --- the frame and the file --------------------------------------------------------------------------------


def frame(mode: str, header: object, payload: bytes) -> bytes:
    """A whole file."""
    packed = deflate(header, PRESET)
    body = MAGIC + bytes([VERSION, MODES.index(mode)]) + varint(len(packed)) + packed + payload
    return body + blake2b(body, digest_size=DIGEST_BYTES).digest()


def unframe(data: bytes) -> tuple[str, object, Reader]:
    """(mode, header, reader of the payload) of a file whose checksum is right."""
    if not data:
        raise FormatError("the file is empty")
    if data[:4] != MAGIC[:len(data)]:
        raise FormatError("not a compressed model")
    if len(data) > 4 and data[4] != VERSION:
        raise FormatError(f"written in format {data[4]}, and this version reads format {VERSION}: "
                          f"{'install a newer one' if data[4] > VERSION else 'it is damaged'}")
    body = data[:-DIGEST_BYTES]
    if len(body) < 6 or blake2b(body, digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
        raise FormatError("the file is damaged or cut short: its checksum is wrong")
    if body[5] >= len(MODES):
        raise FormatError(f"unknown mode {body[5]}")
    reader = Reader(body[6:])
    return MODES[body[5]], inflate(reader.take(reader.varint()), PRESET), reader


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Replace `path` by `data` in one step: whoever reads it sees the old bytes or the new, never a part.

    Raises CompressError, naming the path, where that fails (disk full, no such folder).
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CompressError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # after success it is gone
            temporary.unlink()


def read_file(path: str | os.PathLike) -> bytes:
    """All bytes of a file; FormatError where there is none."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path}: there is no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error
