"""Files written by earlier versions of the format mean what they meant; what stays float is stored small."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from methods.core.artifact import CompressedModel
from methods.core.errors import FormatError
from methods.core.file import rest
from methods.core.file.storage import decode, from_bytes, to_bytes
from methods.core.file.streams import Reader

STORED = {  # in tests/stored: digests of the bytes and of what they decode to, by the code that wrote them
    "admm_lenet-1910x-levels-lenet5-caffe-relu": ("cba733f6cbe346e1", "f32049f2447e129b"),
    "annc_lenet-1975x-in-two-stages-lenet5-caffe": ("bcb4349ddf877f31", "5d535e1d1584e8ee"),
    "bayesian_bits_table1-lenet-5-mu-0-1-short-lenet5-bb": ("372a1659df80ddcf", "70027167454fab90"),
    "clip_q_table4-uniform-lenet300": ("8d3dcfcf3fb587cb", "4ea61533e9911165"),
    "deep_compression_table2-matched-lenet300": ("630aa1633ae518d6", "88847bf1e3d00428"),
    "deep_compression_table3-matched-lenet5-caffe": ("2c701cd12adaf89c", "f7739d3a49a234c6"),
    "sparq_tables-2-4-weights-5opt-round-resnet56": ("cad766109dc3e10f", "011d1beb4139e0b8"),
}


def digest_of_model(model) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    for tensor in model.weights.values():
        found.update(tensor.codes.contiguous().numpy().tobytes())
    found.update(repr([(edge, q.scale, q.zero, q.bits, q.signed) for edge, q in model.activations.items()]).encode())
    found.update(repr([(edge, w.bits, w.shifts, w.rounding, w.paired, w.sparse24)
                       for edge, w in model.windows.items()]).encode())
    found.update(repr((dict(model.topology.folded), dict(model.topology.widths), model.ranges_by)).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("name", STORED)
def test_files_of_version_1_decode_to_the_same_values(name):
    path, (digest, decoded) = Path(__file__).parent / "stored" / f"{name}.jc", STORED[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == digest
    assert digest_of_model(decode(path)) == decoded


# --- float tensors -----------------------------------------------------------------------------------------


def exact(dtype, *shape):
    return torch.randn(shape).to(dtype).float()


FLOATS = {
    "float32": torch.randn(300), "float16 values": exact(torch.float16, 70, 5),
    "bfloat16": exact(torch.bfloat16, 90) * 2.0**99,
    "denormal halves": torch.tensor([2.0**-24, -(2.0**-24), 65504.0, -0.0, float("inf")]),
    "a nan that no half holds": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
    "just no half": torch.tensor([1.0 + 2.0**-11, 65520.0]), "constant": torch.full((4000,), 0.1),
    "large": torch.randn(200, 200) * 0.02, "empty": torch.empty(0, 4), "scalar": torch.tensor(3.0),
    "double": torch.randn(9).double(), "long": torch.arange(-5, 5), "byte": torch.arange(9, dtype=torch.uint8),
    "flags": torch.tensor([True, False]), "half": torch.randn(7).half(), "brain": torch.randn(7).bfloat16(),
}


@pytest.mark.parametrize("name", FLOATS)
def test_every_kind_of_number_comes_back_bit_for_bit(name, monkeypatch):
    for limit in (rest.LZMA_LIMIT, -1):  # -1: streams, however small
        monkeypatch.setattr(rest, "LZMA_LIMIT", limit)
        for tensors in ({name: FLOATS[name]}, FLOATS):
            back = from_bytes(to_bytes(CompressedModel({}, tensors))[0]).rest
            for key, tensor in tensors.items():
                assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
                width = rest.SAME_WIDTH[tensor.element_size()]
                assert torch.equal(back[key].view(width), tensor.view(width)), key


def test_which_16_bit_format_holds_a_tensor():
    found = {name: rest.narrowest(tensor.reshape(-1)) for name, tensor in FLOATS.items()
             if tensor.dtype == torch.float32}
    wide = ("float32", "a nan that no half holds", "just no half", "constant", "large")
    assert {name for name, dtype in found.items() if dtype == torch.float32} == set(wide)
    assert found["bfloat16"] == torch.bfloat16 and found["denormal halves"] == torch.float16


def entropy_bytes(symbols):
    counts = np.bincount(symbols)
    share = counts[counts > 0] / len(symbols)
    return -(share * np.log2(share)).sum() * len(symbols) / 8


def test_float_tensors_take_the_entropy_of_their_exponents():
    values = torch.randn(100_000) * 0.02
    bits = values.numpy().view(np.uint32)
    packed = len(rest.pack_rest({"a": values}, "best"))
    assert packed <= entropy_bytes(bits >> 23 & 255) + 3 * 100_000 + 100
    halves = values.half()
    bits = halves.numpy().view(np.uint16)
    for tensor in (halves, halves.float()):
        assert len(rest.pack_rest({"a": tensor}, "best")) <= entropy_bytes(bits >> 10 & 31) + 11 / 8 * 100_000 + 100


def test_small_networks_keep_the_smallest_of_all_packings():
    ones, text = torch.ones(64), torch.randn(8).repeat(100)
    assert len(rest.pack_rest({"a": ones}, "best")) < 20
    assert len(rest.pack_rest({"a": text}, "best")) < 120  # repetition, which only LZMA sees
    assert rest.pack_rest({"a": torch.randn(2)}, "paper")[0] == rest.RAW


@pytest.mark.parametrize("data", [
    bytes([rest.STREAMS]), bytes([rest.STREAMS, 0, 6, 0, 0]), bytes([rest.STREAMS, 0, 2]) + b"\0\x50" + b"\0\2" * 2,
    bytes([rest.STREAMS, 0, 0]) + b"\0\2" * 4 + b"x",
], ids=["nothing", "unknown width", "field too large", "bytes left over"])
def test_malicious_streams_of_floats(data):
    with pytest.raises(FormatError):
        rest.read_rest(Reader(data), {"r": [["a", [2]]], "t": {}})
