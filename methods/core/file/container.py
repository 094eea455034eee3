"""The file around the tensors: frame and checksum, header, activation quantizers, safe writing.

    file         magic[4] version[1] mode[1] varint(bytes) header payload blake2b[8]
    header       deflated JSON without floats, see HEADER
    activations  varint(bytes), deflated JSON, see ACTIVATIONS, and the scales as float32 or float64; or varint(0)
    rest         float tensors, see rest.py, to the end of the payload

Version 2 added the packing STREAMS of float tensors, the layout CLASSED of masks, and grids in 16 bits; version 3
removed blocks. A file is of version 2 unless it needs 3; those of all versions are read.
"""

# mypy: disable-error-code=attr-defined

import contextlib
import json
import math
import os
import secrets
import stat
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CompressError, FormatError
from ..quantizers import DTYPE_BYTES, MAX_BITS, ActivationQuantizer, Topology, Window
from .streams import Reader, varint

if TYPE_CHECKING:
    from ..artifact import CompressedModel

MAGIC = b"\x8aJCM"
VERSION, PLAIN = 3, 2  # the newest; that of a file without removed blocks
MODES = ("paper", "best")
DIGEST_BYTES = 8
MAX_JSON = 1 << 21  # bytes of text
MAX_DIMENSIONS = 8
FEW_ELEMENTS = 1 << 24  # a file of any size may hold this many numbers; beyond, so many per byte:
ELEMENTS_PER_BYTE = 1 << 10
MAX_WIDTH = 1 << 24  # channels of a layer

# [[layer, shape, bits]], [[name, shape]] of the rest, {name: dtype other than float32}, topology, 1 = harness ranges;
# d: removed blocks; b, z: the layers, a bit each, whose biases begin the rest, and whose widths in the topology are
# those of their shapes
HEADER = {"w": [(str, [int], int)], "r": [(str, [int])], "t": {str: str}, "f": {str: str}, "s": {str: (int, int)},
          "d": [str], "h": int, "b": int, "z": int}
# 1 = float64 scales, [[edge, bits, zero, signed]], [[edge, bits, shifts, flags]] of the windows
ACTIVATIONS = (int, [(str, int, int, int)], [(str, int, [int], int)])
# Text that the header may repeat for free. It is part of the format: never edit it within a version.
PRESET = (b'"t":{"float16"bfloat16"int64"},"f":{"s":{"downsample.1features.classifier.shortcut.head.blocks.layers.'
          b'[1],[10],[16],[32],[100],[512],[128,[256,[64,3,3],1,1],layer4.2.layer3.1.layer2.0.layer1.0.'
          b'conv4conv3.bn3.conv2conv1.bn2.bn1.fc3fc2fc1fc.weight",[.bias",[running_var",[running_mean",['
          b'"r":[["{"w":[["')



def max_elements(file_bytes: int, stated: int | None = None) -> int:
    """Numbers that a file may declare: as stated, else by its size, so that a tiny file cannot ask for all memory."""
    return max(FEW_ELEMENTS, ELEMENTS_PER_BYTE * file_bytes) if stated is None else stated


# --- JSON parts --------------------------------------------------------------------------------------------


def json_bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def deflate(value: object, preset: bytes) -> bytes:
    """JSON `value`, compact and compressed; `preset` holds text that it may repeat for free."""
    text = json_bytes(value)
    if len(text) > MAX_JSON:
        raise CompressError(f"names and shapes take {len(text)} bytes; a file holds at most {MAX_JSON}")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, preset)
    return packer.compress(text) + packer.flush()


def inflate(blob: bytes, preset: bytes) -> object:
    """The inverse of `deflate`; FormatError for anything that is not bounded JSON without floats."""
    unpacker = zlib.decompressobj(-15, preset)
    try:
        text = unpacker.decompress(blob, MAX_JSON + 1)
        if len(text) > MAX_JSON or not unpacker.eof or unpacker.unused_data:
            raise FormatError("the header has a wrong length")
        return json.loads(text.decode("ascii"), parse_float=_no_float, parse_constant=_no_float)
    except FormatError:
        raise
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"the header cannot be read ({type(error).__name__})") from None


def _no_float(text: str) -> None:
    raise FormatError("the header holds a number that is not an integer")


def fits(value: object, form: object) -> bool:
    """Whether JSON `value` has a form: a type, [form of every item], (forms of the items) or {str: form}."""
    if isinstance(form, type):
        return type(value) is form and not (form is str and _is_torn(value))
    if isinstance(form, dict):
        return type(value) is dict and all(
            fits(key, str) and fits(item, form[str]) for key, item in value.items())
    if type(value) is not list:
        return False
    if isinstance(form, list):
        return all(fits(item, form[0]) for item in value)
    return len(value) == len(form) and all(map(fits, value, form))


def _is_torn(text: str) -> bool:
    """Whether a text holds half a letter (a lone surrogate), which no terminal and no file takes."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


# --- header ------------------------------------------------------------------------------------------------


def pack_header(compressed: "CompressedModel") -> dict:
    """The header as JSON values."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in compressed.rest.items()}
    unknown = [name for name, dtype in dtypes.items() if dtype not in DTYPE_BYTES]
    if unknown:
        raise CompressError(f"{unknown[0]} is {dtypes[unknown[0]]}: a file holds {', '.join(DTYPE_BYTES)}")
    biased, cut = _implied(compressed)
    leading = {f"{layer}.bias" for layer in biased}
    parts = {
        "w": [[layer, list(t.codes.shape), t.bits] for layer, t in compressed.weights.items()],
        "r": [[name, list(tensor.shape)] for name, tensor in compressed.rest.items() if name not in leading],
        "t": {name: dtype for name, dtype in dtypes.items() if dtype != "float32"},
        "f": dict(compressed.topology.folded),
        "s": {name: list(width) for name, width in compressed.topology.widths.items() if name not in cut},
        "d": list(compressed.topology.removed),
        "h": int(compressed.ranges_by == "harness"),
        "b": sum(1 << place for place, layer in enumerate(compressed.weights) if layer in biased),
        "z": sum(1 << place for place, layer in enumerate(compressed.weights) if layer in cut),
    }
    return {key: part for key, part in parts.items() if part}


def _implied(compressed: "CompressedModel") -> tuple[set[str], set[str]]:
    """Layers whose bias, and whose widths, follow from the shape of their weight; the biases lead the rest."""
    biases, names = [f"{layer}.bias" for layer in compressed.weights], list(compressed.rest)
    leading = [name for name in biases if name in compressed.rest]
    plain = names[:len(leading)] == leading and all(
        compressed.rest[f"{layer}.bias"].shape == t.codes.shape[:1] for layer, t in compressed.weights.items()
        if f"{layer}.bias" in compressed.rest)
    biased = {name.removesuffix(".bias") for name in leading} if plain else set()
    widths = compressed.topology.widths
    return biased, {layer for layer, t in compressed.weights.items() if widths.get(layer) == tuple(t.codes.shape[:2])}


def _expanded(header: dict) -> dict:
    """The header with what follows from the shapes written out."""
    layers, masks = header["w"], (header["b"], header["z"])
    if not all(0 <= mask and mask.bit_length() <= len(layers) for mask in masks) or not all(
            len(shape) > 1 for _, shape, _ in layers):
        raise FormatError("the header holds an impossible shape, or bits of layers that are not there")
    biased, cut = ([layer for place, layer in enumerate(layers) if mask >> place & 1] for mask in masks)
    return header | {"r": [[f"{name}.bias", shape[:1]] for name, shape, _ in biased] + header["r"],
                     "s": header["s"] | {name: shape[:2] for name, shape, _ in cut}}


def check_header(header: object, limit: int) -> dict:
    """A header with all its parts; FormatError unless it has the right form and declares at most `limit` numbers."""
    if type(header) is not dict or not set(header) <= set(HEADER) or not all(
            fits(part, HEADER[key]) for key, part in header.items()):
        raise FormatError("the header has the wrong form")
    header = _expanded({"w": [], "r": [], "t": {}, "f": {}, "s": {}, "d": [], "h": 0, "b": 0, "z": 0} | header)
    for part in ("w", "r"):
        if len({entry[0] for entry in header[part]}) != len(header[part]):
            raise FormatError("the header names a tensor twice")
    shapes = [entry[1] for entry in header["w"] + header["r"]]
    if not all(len(shape) <= MAX_DIMENSIONS and all(0 <= size for size in shape) for shape in shapes):
        raise FormatError("the header holds an impossible shape")
    if sum(math.prod(max(size, 1) for size in shape) for shape in shapes) > limit:
        raise FormatError(f"the header declares more values than the {limit} that a file of this size, or for this "
                          "network, may hold (decode takes max_elements)")
    if not all(1 <= width <= MAX_WIDTH for widths in header["s"].values() for width in widths):
        raise FormatError("the header holds an impossible width of a layer")
    if not all(1 <= bits <= MAX_BITS for _, _, bits in header["w"]):
        raise FormatError("the header holds an impossible bit width")
    _check_removed(header)
    if not set(header["t"]) <= {name for name, _ in header["r"]} or not set(header["t"].values()) <= set(DTYPE_BYTES):
        raise FormatError("the header holds an unknown dtype")
    return header


def _check_removed(header: dict) -> None:
    """FormatError where a removed block is named twice, lies in another, or has anything left in the file."""
    gone = header["d"]
    left = [name for name, *_ in header["w"] + header["r"]] + [*header["f"], *header["f"].values(), *header["s"]]
    for path in gone:
        others = [name for name in gone + left if f"{name}.".startswith(f"{path}.")]
        if not path or others != [path]:
            raise FormatError(f"the header removes {path!r} and names {', '.join(map(repr, others[:3]))}")


def topology(header: dict) -> Topology:
    return Topology(header["f"], {name: (out, into) for name, (out, into) in header["s"].items()}, tuple(header["d"]))


# --- activations -------------------------------------------------------------------------------------------


def pack_activations(compressed: "CompressedModel", header: dict) -> bytes:
    """Quantizers and windows; names that the header holds already are repeated for free."""
    quantizers = compressed.activations
    if not quantizers:
        return varint(0)
    scales = np.array([q.scale for q in quantizers.values()], np.float64)
    with np.errstate(over="ignore"):
        double = bool((scales.astype(np.float32) != scales).any())
    blob = deflate([
        int(double),
        [[edge, q.bits, q.zero, int(q.signed)] for edge, q in quantizers.items()],
        [[edge, w.bits, list(w.shifts), w.rounding + 2 * w.paired + 4 * w.sparse24]
         for edge, w in compressed.windows.items()],
    ], json_bytes(header))
    return varint(len(blob)) + blob + scales.astype("<f8" if double else "<f4").tobytes()


def read_activations(reader: Reader, header: dict) -> tuple[dict[str, ActivationQuantizer], dict[str, Window]]:
    """The inverse of `pack_activations`, for the header as it was read."""
    length = reader.varint()
    if length == 0:
        return {}, {}
    found = inflate(reader.take(length), json_bytes(header))
    if not fits(found, ACTIVATIONS):
        raise FormatError("the activation quantizers have the wrong form")
    double, quantizers, windows = found
    dtype = np.dtype("<f8" if double else "<f4")
    scales = np.frombuffer(reader.take(len(quantizers) * dtype.itemsize), dtype).tolist()
    if not all(1 <= bits <= MAX_BITS and signed in (0, 1) for _, bits, _, signed in quantizers):
        raise FormatError("an activation quantizer has impossible values")
    if not all(1 <= bits <= MAX_BITS and all(0 <= shift <= MAX_BITS for shift in shifts) and 0 <= flags < 8
               for _, bits, shifts, flags in windows):
        raise FormatError("an activation window has impossible values")
    return ({edge: ActivationQuantizer(scale, zero, bits, bool(signed))
             for (edge, bits, zero, signed), scale in zip(quantizers, scales, strict=True)},
            {edge: Window(bits, tuple(shifts), bool(flags & 1), bool(flags & 2), bool(flags & 4))
             for edge, bits, shifts, flags in windows})


# --- the frame and the file --------------------------------------------------------------------------------


def frame(mode: str, header: dict, payload: bytes) -> bytes:
    """A whole file."""
    packed = deflate(header, PRESET)
    version = VERSION if "d" in header else PLAIN
    body = MAGIC + bytes([version, MODES.index(mode)]) + varint(len(packed)) + packed + payload
    return body + blake2b(body, digest_size=DIGEST_BYTES).digest()


def unframe(data: bytes) -> tuple[str, dict, Reader]:
    """(mode, header, reader of the payload) of a file whose checksum is right."""
    if not data:
        raise FormatError("the file is empty")
    if data[:4] != MAGIC[:len(data)]:
        raise FormatError("not a compressed model")
    if len(data) > 4 and data[4] > VERSION:
        raise FormatError(f"the file is of format version {data[4]}, newer than the {VERSION} that can be read here")
    body = data[:-DIGEST_BYTES]
    if len(body) < 6 or blake2b(body, digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
        raise FormatError("the file is damaged or cut short: its checksum is wrong")
    if not 1 <= body[4] <= VERSION or body[5] >= len(MODES):
        raise FormatError(f"unknown format version {body[4]} or mode {body[5]}")
    reader = Reader(body[6:])
    return MODES[body[5]], inflate(reader.take(reader.varint()), PRESET), reader


def write_file(path: str | os.PathLike, data: bytes | memoryview) -> None:
    """Replace `path` by `data` in one step: whoever reads it sees the old bytes or the new, never a part.

    Raises CompressError, naming the path, where that fails (disk full, no such folder).
    """
    path = Path(path).resolve()  # a link is followed, not replaced
    if path.exists() and not path.is_file():
        raise CompressError(f"cannot write {path}: it is there already and no plain file")
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
    """All bytes of a file that begins as a compressed model does; FormatError where it does not, or cannot be read."""
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FormatError(f"{path}: no plain file")  # a device or a pipe may never end
            start = file.read(len(MAGIC))
            return start + file.read() if start == MAGIC else start
    except FileNotFoundError:
        raise FormatError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise FormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except MemoryError:
        raise FormatError(f"{path}: too large for the memory there is") from None
