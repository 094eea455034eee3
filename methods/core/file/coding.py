"""Coders on integer arrays: relative positions, bit packing, canonical Huffman codes, range coding.

Pure functions; what they raise on damaged input is FormatError. Huffman codes come from bitarray, the range
coder from constriction.
"""

from itertools import islice

import constriction
import numpy as np
from bitarray import bitarray
from bitarray.util import canonical_decode, canonical_huffman, int2ba

from ..errors import FormatError

MAX_DEPTH = 31  # longest Huffman code that bitarray decodes
MAX_ALPHABET = 1 << 17  # a wider range of symbols is packed at fixed width
LENGTH_BITS = 5  # of one canonical code length, 0 (unused) to MAX_DEPTH
MANTISSAS = (0, 1, 2, 3, 4, 6, 8, 12)  # precisions, in bits, of a stored frequency
WHOLE = {8: "<u1", 16: "<u2", 32: "<u4"}  # widths that are whole numbers of memory
BLOCK = 1 << 18  # numbers packed at a time, to bound memory; a multiple of 8
TRIM_SYMBOLS = 1 << 14  # only range-coded streams of fewer symbols are worth the search for a shorter ending


# --- relative positions ------------------------------------------------------------------------------------


def gap_encode(mask_flat: np.ndarray, index_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the kept weights as `index_bits`-bit symbols (Deep Compression, section 2).

    mask_flat  bool [n]
    Returns (symbols int32 [entries], is_filler bool [entries]). A symbol is the number of zeros skipped since
    the last entry; a filler is a stored zero, with the largest symbol, where more have to be skipped.
    """
    runs = np.diff(np.flatnonzero(mask_flat), prepend=-1) - 1
    fillers = runs >> index_bits
    ends = np.cumsum(fillers + 1) - 1
    entries = int(ends[-1]) + 1 if len(ends) else 0
    symbols = np.full(entries, (1 << index_bits) - 1, np.int32)
    symbols[ends] = runs & ((1 << index_bits) - 1)
    is_filler = np.ones(entries, bool)
    is_filler[ends] = False
    return symbols, is_filler


def gap_decode(symbols: np.ndarray) -> np.ndarray:
    """Flat positions int64 [entries], fillers included."""
    return np.cumsum(symbols.astype(np.int64) + 1) - 1


def filler_count(mask_flat: np.ndarray, index_bits: int) -> int:
    """How many fillers `gap_encode` inserts."""
    return int(((np.diff(np.flatnonzero(mask_flat), prepend=-1) - 1) >> index_bits).sum())


# --- statistics --------------------------------------------------------------------------------------------


def histogram(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct symbols in rising order, their counts)."""
    if len(symbols) == 0 or int(symbols.max()) - int(symbols.min()) >= MAX_ALPHABET:
        return np.unique(symbols, return_counts=True)
    counts = np.bincount(symbols - symbols.min())
    used = np.flatnonzero(counts)
    return used + symbols.min(), counts[used]


def entropy(symbols: np.ndarray) -> float:
    """Zero-order entropy in bits per symbol; 0 for an empty array."""
    counts = histogram(symbols)[1]
    share = counts / max(len(symbols), 1)
    return abs(float((share * np.log2(share)).sum()))


def huffman_lengths(symbols: np.ndarray) -> dict[int, int]:
    """{symbol: length of its Huffman code in bits}; a single distinct symbol gets 1 bit."""
    values, counts = histogram(symbols)
    return dict(zip(values.tolist(), code_lengths(counts).tolist(), strict=True))


def huffman_mean_bits(symbols: np.ndarray) -> float:
    """Mean length in bits of the Huffman codes over `symbols`, table not counted; 0 for an empty array."""
    counts = histogram(symbols)[1]
    return float(counts @ code_lengths(counts)) / max(len(symbols), 1)


# --- fixed width -------------------------------------------------------------------------------------------


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` numbers of `width` bits."""
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Integers in [0, 2^width) as `width` bits each, least significant bit first."""
    if width in WHOLE:
        return values.astype(WHOLE[width]).tobytes()
    packed = []
    for start in range(0, len(values), BLOCK):
        block = values[start:start + BLOCK]
        bits = np.empty((len(block), width), np.uint8)
        for place in range(width):
            bits[:, place] = (block >> place) & 1
        packed.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(packed)


def unpack_bits(data: bytes, width: int, count: int) -> np.ndarray:
    """The `count` integers, int64, that `pack_bits` stored."""
    if width in WHOLE:
        return np.frombuffer(data, WHOLE[width], count).astype(np.int64)
    values, stored = np.zeros(count, np.int64), np.frombuffer(data, np.uint8)
    for start in range(0, count, BLOCK):
        block = values[start:start + BLOCK]  # a view
        first = start * width // 8
        bits = np.unpackbits(stored[first:first + packed_size(BLOCK, width)], count=len(block) * width,
                             bitorder="little")
        for place, plane in enumerate(bits.reshape(len(block), width).T):
            block |= plane.astype(np.int64) << place
    return values


# --- canonical Huffman codes -------------------------------------------------------------------------------


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths in bits, int64 [alphabet], of the Huffman codes for a histogram; 0 where a symbol is unused."""
    used, lengths = np.flatnonzero(counts), np.zeros(len(counts), np.int64)
    if len(used):
        codes = canonical_huffman(dict(zip(used.tolist(), counts[used].tolist(), strict=True)))[0]
        lengths[used] = [len(codes[symbol]) for symbol in used.tolist()]
    return lengths


def _canonical_order(lengths: np.ndarray) -> np.ndarray:
    """Used symbols by rising length, then by rising symbol."""
    return np.argsort(lengths, kind="stable")[int((lengths == 0).sum()):]


def _canonical_codes(lengths: np.ndarray) -> dict[int, bitarray]:
    """The codes that the lengths alone define (bitarray's own order equal lengths by its tree)."""
    codes, code, last = {}, -1, 0
    for symbol in _canonical_order(lengths).tolist():
        length = int(lengths[symbol])
        code = (code + 1) << (length - last)
        codes[symbol], last = int2ba(code, length), length
    return codes


def huffman_encode(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """`symbols` in [0, alphabet) in the canonical code with these lengths [alphabet]."""
    bits = bitarray(endian="little")
    bits.encode(_canonical_codes(lengths), symbols.tolist())
    return bits.tobytes()


def huffman_decode(data: bytes, lengths: np.ndarray, count: int) -> np.ndarray:
    """The `count` symbols, int64, behind canonical code lengths [alphabet]."""
    per_length = np.bincount(lengths, minlength=MAX_DEPTH + 1)
    per_length[0] = 0
    if sum(int(n) << (MAX_DEPTH - length) for length, n in enumerate(per_length)) != 1 << MAX_DEPTH:
        raise FormatError("a Huffman table is no complete prefix code")
    bits = bitarray(endian="little")
    bits.frombytes(data)
    decoded = islice(canonical_decode(bits, per_length.tolist(), _canonical_order(lengths).tolist()), count)
    try:
        symbols = np.fromiter(decoded, np.int64)
    except ValueError:  # the bits end inside a code
        raise FormatError("a Huffman stream is too short") from None
    if len(symbols) != count or packed_size(int(lengths[symbols].sum()), 1) != len(data):
        raise FormatError("a Huffman stream has the wrong length")
    return symbols


# --- range coding ------------------------------------------------------------------------------------------


def frequency_codes(counts: np.ndarray, mantissa: int) -> np.ndarray:
    """Counts rounded to `mantissa` + 1 significant bits, as small floats: exponent << mantissa | fraction.

    0 stays 0 and nothing else becomes 0; `frequencies` is the inverse on rounded counts.
    """
    size = np.frexp(counts.astype(np.float64))[1]  # bit length
    exponent = np.maximum(size - mantissa - 1, 0).astype(np.int64)
    rounded = (counts + ((1 << exponent) >> 1)) >> exponent
    return (exponent << mantissa) + rounded  # a carry out of `rounded` moves on into the exponent


def frequencies(codes: np.ndarray, mantissa: int) -> np.ndarray:
    """int64 frequencies behind `frequency_codes`."""
    exponent, fraction = codes >> mantissa, codes & ((1 << mantissa) - 1)
    return np.where(exponent > 0, ((1 << mantissa) + fraction) << np.maximum(exponent - 1, 0), fraction)


def fit_frequencies(counts: np.ndarray) -> tuple[float, int, int, np.ndarray]:
    """(bits, index into MANTISSAS, bits per code, codes int64 [alphabet]) with fewest bits of table plus data."""
    used = counts > 0

    def bits(place: int) -> tuple[float, int, int, np.ndarray]:
        codes = frequency_codes(counts, MANTISSAS[place])
        width = max(int(codes.max()).bit_length(), MANTISSAS[place])
        share = frequencies(codes, MANTISSAS[place])[used]
        data = float((counts[used] * (np.log2(share.sum()) - np.log2(share))).sum())
        return data + width * len(counts), place, width, codes

    return min(map(bits, range(len(MANTISSAS))), key=lambda option: option[:2])


def _model(freqs: np.ndarray):
    return constriction.stream.model.Categorical(freqs.astype(np.float64), perfect=False)


Part = tuple[np.ndarray, np.ndarray]  # symbols in [0, alphabet), or how many; their frequencies int64 [alphabet]


def range_encode(symbols: np.ndarray, freqs: np.ndarray) -> bytes:
    """`symbols` in [0, alphabet) under integer frequencies [alphabet], of which two or more are positive."""
    return range_encode_parts([(symbols, freqs)])


def range_encode_parts(parts: list[Part]) -> bytes:
    """Several sequences of symbols in one stream, each under frequencies of its own."""
    encoder = constriction.stream.queue.RangeEncoder()
    for symbols, freqs in parts:
        used = np.flatnonzero(freqs)
        rank = np.zeros(len(freqs), np.int32)
        rank[used] = np.arange(len(used))
        encoder.encode(rank[symbols], _model(freqs[used]))
    data = encoder.get_compressed().astype(">u4").tobytes()
    return _trim(data, parts).rstrip(b"\0")


def _trim(data: bytes, parts: list[Part]) -> bytes:
    """The coder ends on a whole word; most of its bytes can go if the prefix before them is rounded up."""
    counts = [(len(symbols), freqs) for symbols, freqs in parts]
    if sum(count for count, _ in counts) > TRIM_SYMBOLS:
        return data
    for length in range(max(len(data) - 7, 1), len(data)):
        head = int.from_bytes(data[:length], "big") + 1
        if head >> 8 * length:
            continue
        shorter = head.to_bytes(length, "big")
        try:
            found = range_decode_parts(shorter, counts)
        except FormatError:
            continue
        if all(np.array_equal(one, symbols) for one, (symbols, _) in zip(found, parts, strict=True)):
            return shorter
    return data


def range_decode(data: bytes, freqs: np.ndarray, count: int) -> np.ndarray:
    """The `count` symbols, int64, that `range_encode` stored under the same frequencies."""
    return range_decode_parts(data, [(count, freqs)])[0]


def range_decode_parts(data: bytes, parts: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
    """The symbols, int64, of (count, frequencies) each that `range_encode_parts` stored."""
    used = [np.flatnonzero(freqs) for _, freqs in parts]
    if any(len(one) < 2 for one in used):
        raise FormatError("a frequency table has fewer than two symbols")
    words = np.frombuffer(data + bytes(8 + -len(data) % 4), ">u4").astype(np.uint32)  # zeros were cut off
    try:
        decoder = constriction.stream.queue.RangeDecoder(words)
        return [one[decoder.decode(_model(freqs[one]), count)]
                for one, (count, freqs) in zip(used, parts, strict=True)]
    except AssertionError:  # constriction's word for data that no symbol explains
        raise FormatError("a range-coded stream does not fit its frequency table") from None
