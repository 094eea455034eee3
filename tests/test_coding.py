"""The coders against definitions restated here and golden vectors (Deep Compression spec, sections 4 and 5)."""

import math
from collections import Counter

import numpy as np
import pytest

from methods.core.errors import FormatError
from methods.core.file import coding, streams
from methods.core.file.coding import entropy, filler_count, gap_decode, gap_encode, huffman_lengths, huffman_mean_bits
from methods.core.file.streams import Reader, decode_stream, encode_stream, signed, varint

RNG = np.random.default_rng(0)


def gaps_by_hand(positions, bits):
    """The relative index, one position at a time: [(V or F, symbol)]."""
    out, last = [], -1
    for position in positions:
        while position - last > 2**bits:
            out.append(("F", 2**bits - 1))
            last += 2**bits
        out.append(("V", position - last - 1))
        last = position
    return out


def mask_of(positions, n=None):
    mask = np.zeros(n or max(positions, default=0) + 3, bool)
    mask[list(positions)] = True
    return mask


def encoded(positions, bits, n=None):
    symbols, is_filler = gap_encode(mask_of(positions, n), bits)
    return [("F" if filler else "V", int(symbol)) for symbol, filler in zip(symbols, is_filler, strict=True)]


@pytest.mark.parametrize("bits, positions, golden", [
    (3, [1, 4, 15], "V1 V2 F7 V2"), (3, [0], "V0"), (3, [7], "V7"), (3, [8], "F7 V0"), (3, [16], "F7 F7 V0"),
    (3, [0, 8], "V0 V7"), (3, [0, 9], "V0 F7 V0"), (3, [], ""), (5, [31], "V31"), (5, [32], "F31 V0"),
])
def test_gap_golden_vectors(bits, positions, golden):
    assert " ".join(f"{kind}{symbol}" for kind, symbol in encoded(positions, bits)) == golden


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 1.0])
def test_gap_against_a_plain_loop_and_back(bits, density):
    n = 3000
    mask = RNG.random(n) < density
    mask[[0, n - 1]] |= density > 0  # the first and the last position
    positions = np.flatnonzero(mask).tolist()
    assert encoded(positions, bits, n) == gaps_by_hand(positions, bits)
    symbols, is_filler = gap_encode(mask, bits)
    assert filler_count(mask, bits) == is_filler.sum()
    assert gap_decode(symbols)[~is_filler].tolist() == positions
    assert not len(symbols) or symbols.max() < 2**bits and gap_decode(symbols).max() < n


def test_every_single_gap():
    for bits in (3, 4, 5):
        for gap in range(1, 400):
            assert filler_count(mask_of([gap - 1]), bits) == (gap - 1) // 2**bits
            assert encoded([gap - 1], bits) == gaps_by_hand([gap - 1], bits)


def test_huffman_golden_lengths():
    counts = {"a": 45, "b": 13, "c": 12, "d": 16, "e": 9, "f": 5}
    lengths = huffman_lengths(np.repeat(np.arange(6), list(counts.values())))
    assert lengths == {0: 1, 1: 3, 2: 3, 3: 3, 4: 4, 5: 4}
    assert sum(lengths[i] * count for i, count in enumerate(counts.values())) == 224
    dyadic = np.repeat(np.arange(5), [8, 4, 2, 1, 1])
    assert huffman_mean_bits(dyadic) == entropy(dyadic) == 1.875


def test_entropy_by_definition():
    symbols = RNG.integers(-3, 9, 1000) ** 2
    by_hand = -sum(c / 1000 * math.log2(c / 1000) for c in Counter(symbols.tolist()).values())
    assert entropy(symbols) == pytest.approx(by_hand, abs=1e-12)
    assert entropy(np.array([0, 10**6])) == 1.0  # too wide a range to count in a table
    assert entropy(np.array([7, 7, 7])) == 0.0 and entropy(np.array([], int)) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_huffman_properties(seed):
    rng = np.random.default_rng(seed)
    bits = int(rng.integers(1, 9))
    symbols = np.minimum(rng.geometric(rng.uniform(0.02, 0.9), 500) - 1, 2**bits - 1)
    lengths, used = huffman_lengths(symbols), len(set(symbols.tolist()))
    assert set(lengths) == set(symbols.tolist())
    if used > 1:
        assert sum(2.0**-length for length in lengths.values()) == 1.0  # Kraft, and complete
        assert entropy(symbols) - 1e-12 <= huffman_mean_bits(symbols) < entropy(symbols) + 1
    assert huffman_mean_bits(symbols) <= max(bits, 1)
    assert huffman_lengths(symbols) == lengths


def test_huffman_of_one_symbol_and_of_none():
    assert huffman_lengths(np.array([4, 4])) == {4: 1} and huffman_lengths(np.array([], int)) == {}
    assert huffman_mean_bits(np.array([4, 4])) == 1.0 and huffman_mean_bits(np.array([], int)) == 0.0


def test_canonical_code_is_defined_by_its_lengths():
    # lengths 2, 1, 3, 3 give, by rising length and then symbol, 1: 0, 0: 10, 2: 110, 3: 111
    data = coding.huffman_encode(np.array([0, 1, 2, 3]), np.array([2, 1, 3, 3]))
    assert "".join(f"{byte:08b}"[::-1] for byte in data)[:9] == "100110111"


@pytest.mark.parametrize("lengths", [[0, 0, 1], [1, 1, 1], [1, 2, 3], [0, 0]])
def test_no_prefix_code_is_refused(lengths):
    with pytest.raises(FormatError):
        coding.huffman_decode(b"\0", np.array(lengths), 3)


@pytest.mark.parametrize("width", [1, 3, 8, 13, 33])
def test_bit_packing_is_one_little_endian_number(width):
    values = RNG.integers(0, 2**width, 100)
    whole = sum(int(value) << width * place for place, value in enumerate(values))
    packed = coding.pack_bits(values, width)
    assert packed == whole.to_bytes(len(packed), "little") and len(packed) == coding.packed_size(100, width)
    assert (coding.unpack_bits(packed, width, 100) == values).all()


def test_bit_packing_across_blocks(monkeypatch):
    values = RNG.integers(0, 2**5, 1000)
    whole = coding.pack_bits(values, 5)
    monkeypatch.setattr(coding, "BLOCK", 64)
    assert coding.pack_bits(values, 5) == whole
    assert (coding.unpack_bits(whole, 5, 1000) == values).all()


@pytest.mark.parametrize("mantissa", coding.MANTISSAS)
def test_stored_frequencies_keep_their_significant_bits(mantissa):
    counts = np.concatenate([np.arange(5000), [2**20 - 1, 2**28 + 12345]])
    stored = coding.frequencies(coding.frequency_codes(counts, mantissa), mantissa)
    assert ((stored == 0) == (counts == 0)).all()
    assert (np.abs(stored - counts) <= counts * 2.0**-(mantissa + 1)).all()
    exact = counts < 2 << mantissa
    assert (stored[exact] == counts[exact]).all()


def test_range_coder_is_close_to_the_entropy_and_exact():
    for n, share in ((1, [1, 1]), (50, [5, 3, 2]), (5000, [97, 2, 1]), (100_000, [90] + [1] * 10)):
        symbols = RNG.choice(len(share), n, p=np.array(share) / sum(share))
        freqs = np.maximum(np.bincount(symbols, minlength=len(share)), 1)
        data = coding.range_encode(symbols, freqs)
        assert (coding.range_decode(data, freqs, n) == symbols).all()
        ideal = -np.log2(freqs[symbols] / freqs.sum()).sum() / 8
        assert len(data) <= 1.001 * ideal + 4


def test_range_coder_gives_long_runs_for_next_to_nothing():
    symbols = np.zeros(1_000_000, np.int64)
    data = coding.range_encode(symbols, np.array([1000, 1]))
    assert data == b""  # all zero bytes, which need not be stored
    assert (coding.range_decode(data, np.array([1000, 1]), 1_000_000) == 0).all()


SHAPES = {
    "empty": np.array([], int), "single": np.array([-5]), "constant": np.full(1000, 2**31), "two": np.array([0, 1]),
    "skewed": np.minimum(RNG.geometric(0.3, 5000), 30), "negative": RNG.integers(-128, 128, 3000),
    "sparse alphabet": RNG.choice([0, 700, 100_000], 2000), "wide": np.array([-2**32, 5, 2**31]),
    "16 bits": RNG.integers(0, 2**16, 500), "mostly zero": (RNG.random(20_000) < 0.001).astype(int),
}


@pytest.mark.parametrize("coders", [("packed",), ("packed", "huffman"), ("packed", "range"), streams.CODERS])
@pytest.mark.parametrize("name", SHAPES)
def test_streams_round_trip_and_are_no_larger_than_fixed_width(name, coders):
    symbols = SHAPES[name]
    data = encode_stream(symbols, coders)
    reader = Reader(data + b"next")
    found, coder = decode_stream(reader, len(symbols))
    assert (found == symbols).all() and reader.left() == 4 and coder in (*coders, "constant", "empty")
    span = int(symbols.max() - symbols.min()) if len(symbols) else 0
    assert len(data) <= 6 + (len(symbols) * span.bit_length() + 7) // 8


def test_constant_and_empty_streams_cost_no_bits_per_symbol():
    assert encode_stream(np.array([], int), ("huffman",)) == b""
    assert len(encode_stream(np.full(10**6, 3), ("huffman",))) == 2


def test_codes_too_long_for_the_decoder_fall_back_to_fixed_width(monkeypatch):
    symbols = np.repeat(np.arange(12), [2**k for k in range(12)])
    coders = ("packed", "huffman")
    assert decode_stream(Reader(encode_stream(symbols, coders)), len(symbols))[1] == "huffman"
    monkeypatch.setattr(coding, "MAX_DEPTH", 10)
    found, coder = decode_stream(Reader(encode_stream(symbols, coders)), len(symbols))
    assert coder == "packed" and (found == symbols).all()


def test_fibonacci_counts_need_codes_that_are_too_long():
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    assert coding.code_lengths(np.array(counts)).max() == 39 > coding.MAX_DEPTH


def test_numbers():
    for value in (0, 1, -1, 127, 128, -128, 2**40, -2**33):
        reader = Reader(signed(value))
        assert reader.signed() == value and reader.left() == 0
    assert varint(300) == b"\xac\x02" and Reader(b"\xac\x02").varint() == 300
    for bad in (b"", b"\x80", b"\xff" * 9):
        with pytest.raises(FormatError):
            Reader(bad).varint()


@pytest.mark.parametrize("coders", [("packed", "huffman"), ("packed", "range")])
def test_damaged_streams_never_raise_anything_else(coders):
    symbols = np.minimum(RNG.geometric(0.3, 300), 20)
    data = encode_stream(symbols, coders)
    for _ in range(1500):
        damaged = bytearray(data)
        for place in RNG.integers(0, len(data), RNG.integers(1, 4)):
            damaged[place] = RNG.integers(256)
        try:
            found, _ = decode_stream(Reader(bytes(damaged[:RNG.integers(1, len(data) + 1)])), len(symbols))
        except FormatError:
            continue
        assert len(found) == len(symbols)
