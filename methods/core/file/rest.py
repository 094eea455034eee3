"""The tensors that stay float, as bytes: the last part of the payload.

    rest     packing[1], then  RAW: the tensors' little-endian bytes | LZMA, PLANES: the same, packed | STREAMS:
    streams  stored widths of the float32 tensors, then the streams of each kind of number in the order of FIELDS

A float32 tensor whose values are all float16, or all bfloat16, is stored as such: reading it back gives the same bits.
Numbers of one kind are taken together and cut into fields, a stream each: the exponents, which are far from uniform,
apart from mantissas and signs, which are nearly so and cost no time.
"""

import lzma
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..artifact import DTYPES
from ..errors import FormatError
from . import coding
from .streams import Reader, decode_stream, encode_stream

SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RAW, LZMA, PLANES, STREAMS = range(4)  # PLANES is LZMA of all first bytes, all second bytes, …
PLANE = 4  # bytes of a float32
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
LZMA_LIMIT = 1 << 17  # bytes: above, its 2 MB/s are not worth the little it gains
CODERS = ("packed", "range")
LEAST_GAIN, SAMPLE = 0.99, 1 << 16
NARROW = (torch.float32, torch.float16, torch.bfloat16)  # how a float32 tensor is stored: the index into this
# {kind of number: widths of its fields, from the top bit; of floats the sign was moved to the end}
BYTES = {size: (8,) * size for size in (1, 2, 4, 8)}
FIELDS = {torch.float32: (8, 8, 8, 8), torch.float16: (5, 8, 3), torch.bfloat16: (8, 8), **BYTES}


def pack_rest(rest: Mapping[str, Tensor], mode: str) -> bytes:
    """The tensors that stay float, raw in mode "paper", in mode "best" by the smallest packing."""
    tensors = [tensor.detach().cpu().reshape(-1) for tensor in rest.values()]
    if mode == "best" and tensors:
        packed = bytes([STREAMS]) + _pack_streams(tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > LZMA_LIMIT:
            return packed
    raw = b"".join(bits_of(tensor).tobytes() for tensor in tensors)
    packings = [bytes([RAW]) + raw]
    if mode == "best" and tensors:
        packings += [bytes([LZMA]) + lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTERS), packed]
        if len(raw) % PLANE == 0:
            planes = np.frombuffer(raw, np.uint8).reshape(-1, PLANE).T.tobytes()
            packings.append(bytes([PLANES]) + lzma.compress(planes, lzma.FORMAT_RAW, filters=FILTERS))
    return min(packings, key=len)


def read_rest(reader: Reader, header: dict) -> dict[str, Tensor]:
    """The inverse of `pack_rest`: all that is left of the payload."""
    shapes = {name: (shape, DTYPES[header["t"].get(name, "float32")]) for name, shape in header["r"]}
    packing = reader.take(1)[0]
    if packing == STREAMS:
        flat = _read_streams(reader, [(math.prod(shape), dtype) for shape, dtype in shapes.values()])
        if reader.left():
            raise FormatError(f"{reader.left()} bytes follow the float tensors")
        return {name: tensor.reshape(shape) for (name, (shape, _)), tensor in zip(shapes.items(), flat, strict=True)}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    whole = Reader(_unpacked(packing, reader.take(reader.left()), sum(sizes.values())))
    return {name: tensor_of(np.frombuffer(whole.take(sizes[name]), f"<i{dtype.itemsize}"), dtype).reshape(shape)
            for name, (shape, dtype) in shapes.items()}


def _unpacked(packing: int, data: bytes, size: int) -> bytes:
    """`size` bytes behind one of the packings that treat all tensors as one."""
    if packing not in (RAW, LZMA, PLANES) or packing == PLANES and size % PLANE:
        raise FormatError(f"unknown packing {packing} of the float tensors")
    if packing != RAW:
        try:
            data = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(data, size + 1)
        except lzma.LZMAError:
            raise FormatError("the float tensors cannot be unpacked") from None
    if len(data) != size:
        raise FormatError(f"the float tensors take {size} bytes, the file holds {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(PLANE, -1).T.tobytes() if packing == PLANES else data


def bits_of(tensor: Tensor) -> np.ndarray:
    """The bits of a flat tensor as little-endian integers of its width."""
    width = tensor.element_size()
    return tensor.view(SAME_WIDTH[width]).numpy().astype(f"<i{width}", copy=False)


def tensor_of(integers: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of `bits_of`; takes integers of any width of which the low bits are the value."""
    integers = integers.astype(f"i{dtype.itemsize}")
    if dtype == torch.bool and not np.isin(integers, (0, 1)).all():
        raise FormatError("a bool tensor holds something else")
    return torch.from_numpy(integers).view(dtype)


# --- fields as streams -------------------------------------------------------------------------------------


def narrowest(tensor: Tensor) -> torch.dtype:
    """The first of float16 and bfloat16 that holds every value of a float32 tensor, bit for bit; else float32."""
    bits = tensor.contiguous().view(torch.int32)
    for dtype in NARROW[1:]:
        if torch.equal(tensor.to(dtype).to(torch.float32).view(torch.int32), bits):
            return dtype
    return torch.float32


def _kinds(dtypes: list[torch.dtype]) -> Iterator[tuple[object, list[int]]]:
    """(kind of number, which tensors hold it), for every kind there is."""
    kinds = [dtype if dtype in FIELDS else dtype.itemsize for dtype in dtypes]
    for kind in FIELDS:
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        if chosen:
            yield kind, chosen


def _pack_streams(tensors: list[Tensor]) -> bytes:
    wide = [i for i, tensor in enumerate(tensors) if tensor.dtype == torch.float32]
    stored = {i: narrowest(tensors[i]) for i in wide}
    out = [encode_stream(np.array([NARROW.index(stored[i]) for i in wide], np.int64), CODERS)]
    tensors = [tensor.to(stored[i]) if i in stored else tensor for i, tensor in enumerate(tensors)]
    for kind, chosen in _kinds([tensor.dtype for tensor in tensors]):
        fields = _split(np.concatenate([bits_of(tensors[i]) for i in chosen]), kind)
        out += [encode_stream(field, CODERS if _is_worth_coding(field, width) else CODERS[:1])
                for field, width in zip(fields, FIELDS[kind], strict=True)]
    return b"".join(out)


def _is_worth_coding(field: np.ndarray, width: int) -> bool:
    """Whether a range coder gains what its time is worth: a field of mantissas may be a hair away from uniform."""
    return coding.entropy(field[::1 + len(field) // SAMPLE]) < LEAST_GAIN * width


def _read_streams(reader: Reader, expected: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Flat tensors with these (sizes, dtypes)."""
    dtypes = [dtype for _, dtype in expected]
    wide = [i for i, dtype in enumerate(dtypes) if dtype == torch.float32]
    widths = decode_stream(reader, len(wide))[0]
    if not ((widths >= 0) & (widths < len(NARROW))).all():
        raise FormatError("a float tensor has an unknown width")
    for i, width in zip(wide, widths.tolist(), strict=True):
        dtypes[i] = NARROW[width]
    found: dict[int, Tensor] = {}
    for kind, chosen in _kinds(dtypes):
        sizes = [expected[i][0] for i in chosen]
        whole = _join([_read_field(reader, sum(sizes), width) for width in FIELDS[kind]], kind)
        for i, part in zip(chosen, np.split(whole, np.cumsum(sizes)[:-1]), strict=True):
            found[i] = tensor_of(part, dtypes[i]).to(expected[i][1])
    return [found[i] for i in range(len(expected))]


def _read_field(reader: Reader, count: int, width: int) -> np.ndarray:
    """uint8 [count]"""
    field = decode_stream(reader, count)[0]
    if count and not (0 <= field.min() and field.max() < 1 << width):
        raise FormatError("a field of the float tensors is out of range")
    return field.astype(np.uint8)


def _split(integers: np.ndarray, kind: object) -> list[np.ndarray]:
    """Fields of numbers, uint8 each."""
    size, widths = integers.dtype.itemsize, FIELDS[kind]
    unsigned = integers.view(f"<u{size}")
    if isinstance(kind, torch.dtype):  # the sign moves to the end, so that the exponent is a field of its own
        unsigned = unsigned << 1 | unsigned >> 8 * size - 1
    if set(widths) == {8}:
        return list(np.ascontiguousarray(unsigned.view(np.uint8).reshape(-1, size).T)[::-1])
    shifts = 8 * size - np.cumsum(widths)
    return [(unsigned >> shift & (1 << width) - 1).astype(np.uint8)
            for shift, width in zip(shifts.tolist(), widths, strict=True)]


def _join(fields: list[np.ndarray], kind: object) -> np.ndarray:
    """The inverse of `_split`, as unsigned integers."""
    widths = FIELDS[kind]
    size = sum(widths) // 8
    if set(widths) == {8}:
        whole = np.stack(fields[::-1], axis=1).view(f"<u{size}").reshape(-1)
    else:
        whole = np.zeros(len(fields[0]), f"<u{size}")
        for field, width in zip(fields, widths, strict=True):
            whole = whole << width | field.astype(whole.dtype)
    return whole >> 1 | whole << 8 * size - 1 if isinstance(kind, torch.dtype) else whole
