"""Whatever is wrong with a file, reading it raises FormatError; whatever goes wrong in writing, the old file stays."""

import json
import lzma
import os
import resource
import tracemalloc
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from methods.core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Levels,
    Window,
)
from methods.core.errors import CompressError, FormatError
from methods.core.file import container, rest
from methods.core.file.storage import decode, encode, from_bytes, inspect, load, to_bytes
from methods.core.file.streams import varint

MODES = ("paper", "best")


def small():
    """A model with something in every part of a file."""
    g = torch.Generator().manual_seed(3)

    def codes(low, high, *shape):
        kept = torch.rand(shape, generator=g) < 0.3
        return torch.randint(low, high, shape, generator=g, dtype=torch.int32), kept

    def tensor(grid, bits, drawn):
        return CompressedTensor.of(drawn[0], grid, bits, drawn[1])

    scale, levels = torch.rand(6, generator=g) + 0.1, torch.tensor([-3, -1, 1, 3], dtype=torch.int32)
    weights = {
        "conv1": tensor(Affine(scale, torch.arange(6, dtype=torch.int32)), 8, codes(-20, 20, 6, 2, 3, 3)),
        "conv2": tensor(Levels(scale, levels), 2, codes(0, 4, 6, 6, 3, 3)),
        "fc": tensor(Codebook(torch.arange(32) / 8), 5, codes(0, 32, 10, 54)),
    }
    return CompressedModel(weights, {"conv1.bias": torch.randn(6, generator=g), "fc.bias": torch.zeros(10)},
                           {"conv1": ActivationQuantizer(0.05)}, {"conv1": Window(3, (0, 1, 2))})


def refused(data, match=None):
    with pytest.raises(FormatError, match=match) as caught:
        from_bytes(data, "net.jc")
    assert str(caught.value).startswith("net.jc: ") and "\n" not in str(caught.value)
    assert "content cannot be read" not in str(caught.value)  # the net below all checks: no known fault falls so deep


@pytest.mark.parametrize("mode", MODES)
def test_truncation_at_every_length(mode):
    data = to_bytes(small(), mode=mode)[0]
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")


@pytest.mark.parametrize("mode", MODES)
def test_every_flipped_byte(mode):
    data = to_bytes(small(), mode=mode)[0]
    rng = np.random.default_rng(0)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        refused(bytes(damaged))


def test_messages(tmp_path):
    data = to_bytes(small())[0]
    refused(b"", "empty")
    refused(b"PK\x03\x04 a zip file", "not a compressed model")
    refused(data[:4] + bytes([9]) + data[5:], "version 9, newer")
    refused(sealed(data[:4] + bytes([0]) + data[5:-8]), "version 0")
    refused(sealed(data[:5] + bytes([9]) + data[6:-8]), "mode 9")
    refused(data[:-1], "damaged or cut short")
    for bad, word in ((tmp_path / "none.jc", "no such file"), (tmp_path, "cannot be read")):
        for read in (decode, inspect, lambda path: load(path, nn.Linear(1, 1))):
            with pytest.raises(FormatError, match=word) as caught:
                read(bad)
            assert str(bad) in str(caught.value)


def sealed(body):
    """`body` with the checksum that makes it a whole file."""
    return body + blake2b(body, digest_size=8).digest()


@pytest.mark.parametrize("mode", MODES)
def test_damage_under_a_valid_checksum_is_refused_or_read_as_some_model(mode):
    data = to_bytes(small(), mode=mode)[0]
    rng = np.random.default_rng(1)
    for _ in range(1500):
        body = bytearray(data[:-8])
        for place in rng.integers(5, len(body), rng.integers(1, 4)):
            body[place] = rng.integers(256)
        try:
            from_bytes(sealed(bytes(body[:rng.integers(6, len(body)) if rng.random() < 0.2 else len(body)])))
        except FormatError:
            continue


FLOAT = np.float32(0.5).tobytes()
GOOD = b"\0" + FLOAT  # an affine grid
DENSE_ONES = GOOD + b"\0" + b"\0\2"  # a constant stream of 1
END = varint(0) + b"\0"  # no activations, nothing in the rest


def layer(shape=(2, 3), bits=4, name="fc", **parts):
    return {"w": [[name, list(shape) if isinstance(shape, tuple) else shape, bits]], **parts}


def test_nothing_may_follow_the_header():
    blob = container.deflate(layer(), container.PRESET)
    body = container.MAGIC + b"\1\1"
    from_bytes(sealed(body + varint(len(blob)) + blob + DENSE_ONES + END))
    refused(sealed(body + varint(len(blob) + 1) + blob + b"\0" + DENSE_ONES + END), "wrong length")


def test_names_with_line_ends_make_one_line():
    refused(container.frame("best", layer(name="a\nb", r=[["a\nb.weight", [0]]]), DENSE_ONES + END), "a b")


def test_the_hand_made_file_is_right():
    model = from_bytes(container.frame("best", layer(d=["f", "fcb"]), DENSE_ONES + END))
    assert model.topology.removed == ("f", "fcb") and torch.equal(model.weights["fc"].decode(), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("header", [
    [], "w", {"x": 1}, {"w": 5}, {"w": [5]}, {"w": [["fc", [2, 3]]]}, layer(bits="4"), layer(bits=0), layer(bits=17),
    layer(bits=True), layer(name=7), layer(shape=(6,)), layer(shape=()), layer(shape=6), layer(shape=(2, -3)),
    layer(shape=(2, "3")), layer(shape=(2, 3) * 5), layer(shape=(2**20, 2**20)), layer(shape=(0, 2**62, 2**62)),
    layer(shape=(2**100, 2**100)), layer(shape=(2, 3, 1, 2**24)), {"w": layer()["w"] * 2}, layer(h="yes"),
    layer(h=1.0), layer(r=[["a", [2**40]]]), layer(r=[["a", [1]], ["a", [1]]]), layer(r=[["fc.weight", [0]]]),
    layer(t={"a": "int64"}), layer(r=[["a", [0]]], t={"a": "object"}), layer(f=[]), layer(f={"a": 1}),
    layer(s={"a": [1]}), layer(s={"a": [1, "2"]}), layer(r=[["a", [1]]]), layer(s={"a": [1, -1]}),
    layer(s={"a": [2**62, 1]}), layer(s={"a": [0, 1]}), layer(name="\ud800"), layer(f={"\udfff": "a"}),
    layer(d="a"), layer(d=[1]), layer(d=[["a"]]), layer(d={"a": 1}), layer(d=["\ud800"]), layer(d=[""]),
    layer(d=["a", "a"]), layer(d=["a", "a.b"]), layer(d=["a.b", "a"]), layer(d=["fc"]), layer(d=["f"], name="f.c"),
    layer(d=["a"], r=[["a.bias", [0]]]), layer(d=["a"], f={"a.b": "c"}), layer(d=["a"], f={"b": "a"}),
    layer(d=["a"], s={"a.b": [1, 1]}), layer(b=2), layer(z=-1), layer(b=1 << 70),
    layer(b="1"), layer(b=1, r=[["fc.bias", [2]]]),
], ids=lambda header: json.dumps(header)[:50])
def test_malicious_headers(header):
    refused(container.frame("best", header, DENSE_ONES + END))


@pytest.mark.parametrize("text", [
    b"", b"5", b"{", b"\xff", b"[" * 100_000, b'{"h":' + b"9" * 5000 + b"}", b'{"h":NaN}', b'{"h":1e999}',
    b" " * 3_000_000,
])
def test_headers_that_are_no_json(text):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, container.PRESET)
    blob = packer.compress(text) + packer.flush()
    for stored in (blob, blob[:-1], blob + b"\0", b"", b"\xff\xff"):
        refused(sealed(container.MAGIC + b"\1\1" + varint(len(stored)) + stored + END))
    refused(sealed(container.MAGIC + b"\1\1" + varint(10**6) + blob), "ends too early")


NAN = np.float32("nan").tobytes()
PACKED, RANGE, HUFFMAN = 1, 2, 3


@pytest.mark.parametrize("block", {
    "nothing": b"",
    "unknown grid": b"\3" + FLOAT + DENSE_ONES[5:],
    "unknown flags": b"\x40" + FLOAT + DENSE_ONES[5:],
    "scale 0": b"\0" + bytes(4) + DENSE_ONES[5:],
    "scale nan": b"\0" + NAN + DENSE_ONES[5:],
    "empty codebook": b"\2\0\0\0\2",
    "long codebook": b"\2" + varint(2**50) + bytes(30),
    "codebook too short for its codes": b"\2\1" + FLOAT + b"\0\0\2",
    "many levels": b"\1" + FLOAT + varint(2**40) + b"\0\2",
    "no levels": b"\1" + FLOAT + b"\0\0\0\2",
    "equal levels": b"\1" + FLOAT + b"\3\0\2\0\0\2",
    "level beyond 32 bits": b"\1" + FLOAT + b"\1\0" + varint(2**40) + b"\0\0\0",
    "zero point beyond 32 bits": b"\x08" + FLOAT + b"\0" + varint(2**40) + b"\0\0\2",
    "code out of range": GOOD + b"\0\0" + varint(2 * 8),
    "code far out of range": GOOD + b"\0\0" + varint(2**55),
    "code that 32 bits would wrap": GOOD + b"\0\0" + varint(2 * (2**32 + 1)),
    "unknown layout": GOOD + b"\4\0\2",
    "mask of twos": GOOD + b"\1\0\4\0\2",
    "gap of no bits": GOOD + b"\2\1\0\0\0\2",
    "gap of 63 bits": GOOD + b"\xfe\1\0\0\0\2",
    "more entries than weights": GOOD + b"\x16\7\0\0\0\2",
    "positions outside": GOOD + b"\x16\4\0\2\0\2",
    "negative position": GOOD + b"\x16\1\0\1\0\2",
    "symbols of no width": GOOD + b"\0" + bytes([PACKED, 0]) + bytes(9),
    "symbols too wide": GOOD + b"\0" + bytes([PACKED | 63 << 2, 0]) + bytes(60),
    "frequencies all 0": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 3]) + bytes(9),
    "alphabet of one": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 1]) + bytes(9),
    "huge alphabet": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0]) + varint(2**40) + bytes(9),
    "huge frequencies": GOOD + b"\0" + bytes([RANGE | 7 << 5, 0, 2]) + b"\xff" * 9,
    "no data for the range coder": GOOD + b"\0" + bytes([RANGE | 4 << 5, 0, 3, 0x11, 0x1]) + varint(2**40),
    "too many Huffman codes": GOOD + b"\0" + bytes([HUFFMAN, 0, 3, 0x21, 4, 1]) + bytes(9),
    "Huffman data too short": GOOD + b"\0" + bytes([HUFFMAN, 0, 2, 0x21, 0, 0]),
    "Huffman data too long": GOOD + b"\0" + bytes([HUFFMAN, 0, 2, 0x21, 0, 9]) + bytes(9),
}.items(), ids=lambda item: item[0])
def test_malicious_blocks(block):
    refused(container.frame("best", layer(), block[1] + END))


def activation_section(value, scales=FLOAT, header=None):
    blob = container.deflate(value, container.json_bytes(header or {}))
    return varint(len(blob)) + blob + scales


@pytest.mark.parametrize("value, scales", [
    ({}, FLOAT), ([0, [], []], FLOAT), ([0, [["a", 8, 0]], []], FLOAT), ([0, [["a", 8, 0, 0]], []], b""),
    ([0, [["a", 8, 0, 0]], []], bytes(4)), ([0, [["a", 8, 0, 0]], []], NAN), ([0, [["a", 8, 300, 0]], []], FLOAT),
    ([0, [["a", 10**12, 0, 0]], []], FLOAT), ([0, [["a", 8, 0, 2]], []], FLOAT),
    ([0, [["a", 8, 0, 0]], [["b", 4, [1], 0]]], FLOAT), ([0, [["a", 8, 0, 0]], [["a", 4, [99], 0]]], FLOAT),
    ([0, [["a", 8, 0, 0]], [["a", 4, [1], 8]]], FLOAT),
    ([0, [["a", 8, 0, 0]], [["a", 4, 1, 0]]], FLOAT), ([1, [["a", 8, 0, 0]], []], FLOAT),
])
def test_malicious_activations(value, scales):
    refused(container.frame("best", {}, activation_section(value, scales) + b"\0"))


@pytest.mark.parametrize("rest", [
    b"", b"\3" + bytes(8), b"\0" + bytes(7), b"\0" + bytes(9), b"\1" + bytes(8), b"\2\xff\xff",
    b"\1" + lzma.compress(bytes(10**7), lzma.FORMAT_RAW, filters=rest.FILTERS),
])
def test_malicious_rest(rest):
    refused(container.frame("best", {"r": [["a", [2]]]}, varint(0) + rest))
    refused(container.frame("best", {"r": [["a", [2]]], "t": {"a": "bool"}}, varint(0) + b"\0\2\0"), "bool")


def test_what_is_no_plain_file_is_not_read(tmp_path):
    for read in (decode, inspect):
        with pytest.raises(FormatError, match="no plain file"):
            read("/dev/zero")
    (tmp_path / "zeros").write_bytes(b"")
    os.truncate(tmp_path / "zeros", 2**40)  # a sparse terabyte
    for path in (tmp_path / "zeros", "a\0b"):
        with pytest.raises(FormatError):
            decode(path)


def test_an_option_raises_the_limit_and_a_network_lowers_it(tmp_path):
    bits = CompressedTensor.of(torch.zeros(3, 50, dtype=torch.int32), Codebook(torch.zeros(1)), 1)
    data, _ = to_bytes(CompressedModel({"fc": bits}, {}))
    assert from_bytes(data, max_elements=150).weights["fc"].codes.shape == (3, 50)
    with pytest.raises(FormatError, match="more values than the 149"):
        from_bytes(data, max_elements=149)
    encode(CompressedModel({"fc": bits}, {}), tmp_path / "net.jc")
    with pytest.raises(FormatError, match="more values than the 8 that"):
        load(tmp_path / "net.jc", nn.Sequential(nn.Linear(1, 2)))


MODELS = Path(__file__).parent.parent / "results" / "models"


@pytest.mark.parametrize("table", ["admm_lenet", "annc_lenet", "clip_q_table4"])
def test_damage_to_stored_files_under_a_valid_checksum(table):
    data = min((path.read_bytes() for path in (MODELS / table).glob("*.jc")), key=len)
    rng = np.random.default_rng(2)
    for _ in range(12):
        body = bytearray(data[:-8])
        for place in rng.integers(6, len(body), rng.integers(1, 3)):
            body[place] ^= 1 << int(rng.integers(8))
        try:
            from_bytes(sealed(bytes(body)))
        except FormatError as error:
            assert "content cannot be read" not in str(error)


def test_a_small_file_cannot_ask_for_much_memory():
    tracemalloc.start()
    refused(container.frame("best", layer(shape=(2**14, 2**14)), DENSE_ONES + END), "more values")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


# --- writing -----------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path, model = tmp_path / "net.jc", small()
    encode(model, path, mode="paper")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CompressError, match="net.jc: No space left"):
                encode(model, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.jc"]
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, tmp_path / "no such folder" / "net.jc")
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, path / "net.jc")
    with pytest.raises(CompressError, match="cannot write"):
        encode(model, tmp_path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.jc"]


def test_a_write_that_the_system_cuts_short(tmp_path):
    """The real thing: the kernel refuses the bytes beyond a limit on the size of files."""
    path, limits = tmp_path / "net.jc", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CompressError, match="cannot write"):
            encode(small(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.jc"]


def test_files_get_the_usual_permissions(tmp_path):
    encode(small(), tmp_path / "net.jc")
    (tmp_path / "plain").write_bytes(b"")
    assert os.stat(tmp_path / "net.jc").st_mode == os.stat(tmp_path / "plain").st_mode


def test_what_could_not_be_read_is_not_written(monkeypatch):
    monkeypatch.setattr(container, "FEW_ELEMENTS", 100)
    monkeypatch.setattr(container, "ELEMENTS_PER_BYTE", 1)
    t = CompressedTensor.of(torch.zeros(40, 50, dtype=torch.int32), Codebook(torch.zeros(1)), 1)
    with pytest.raises(CompressError, match="more values"):
        to_bytes(CompressedModel({"fc": t}, {}))
