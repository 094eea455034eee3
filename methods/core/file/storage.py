"""Compressed models as files: `encode`, `decode`, `load`, `inspect`.

Mode "paper" is Deep Compression's format (sections 2 and 4): of every tensor the relative positions and the codes
of the stored entries, fillers included, each stream in a canonical Huffman code whose table is in the file, or at
fixed width where that is smaller. Mode "best" takes per tensor the smallest of these layouts: dense symbols; a bit
mask and codes; relative positions and codes, by row or by column; the mask by classes of rows and columns. Each
stream is range coded, Huffman coded or at fixed width; so are the exponents and the mantissas of what stays float, and
the few bytes of a small network's go through LZMA where that is smaller.

The payload is one block per tensor (blocks.py), then activation quantizers (container.py) and float tensors (rest.py).
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from torch import nn

from ..artifact import CompressedModel, CompressedTensor
from ..errors import CompressError, ConfigError, FormatError
from ..graph.build import apply
from ..graph.weights import float_layers, float_share
from . import blocks, coding, container
from .rest import pack_rest, read_rest


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file by what they are for; they add up to the file.

    codes        codes of the stored entries, with their Huffman or frequency table
    positions    where the entries are, with their table. Of a dense stream, which holds both, this is the
                 information of the mask, n H(density) bits; the remainder counts as codes
    codebooks    parameters of the grids: scales, zero points, levels, shared values
    rest         tensors that stay float
    activations  activation quantizers and windows
    header       magic, version, names, shapes, bit widths, topology, checksum
    """

    codes: int = 0
    positions: int = 0
    codebooks: int = 0
    rest: int = 0
    activations: int = 0
    header: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


# --- the API -----------------------------------------------------------------------------------------------


def encode(compressed: CompressedModel, path: str | os.PathLike, *, mode: str = "best",
           index_bits: int | str | Mapping[str, int] = 5) -> Sizes:
    """Write `compressed`, all but its notes, to `path` in one step, and say what the bytes are for.

    mode        "best" or "paper", see above
    index_bits  bits of a relative position, 1..16: a number, {layer: number}, or "auto", the smallest of 2..8 for
                each layer. Mode "best" tries 2..8 besides.
    Raises ConfigError for other arguments, CompressError where the file cannot be written.
    """
    data, sizes = to_bytes(compressed, mode=mode, index_bits=index_bits)
    container.write_file(path, data)
    return sizes


def decode(path: str | os.PathLike, *, max_elements: int | None = None) -> CompressedModel:
    """The model that `encode` wrote, bit for bit, without notes; FormatError for anything else.

    max_elements  numbers that the file may hold, checked before any memory is taken; default 2^24, or 2^10 for each
                  byte of the file if that is more
    """
    return from_bytes(container.read_file(path), str(path), max_elements=max_elements)


def load(path: str | os.PathLike, skeleton: nn.Module) -> nn.Module:
    """The network in a file: `apply(decode(path), skeleton)`; the file may hold no more than the skeleton can."""
    parts = skeleton.state_dict().values()
    room = sum(tensor.numel() for tensor in parts) + sum(len(t) for t in parts if t.ndim)  # a fold adds biases
    return apply(decode(path, max_elements=room), skeleton)


def inspect(path: str | os.PathLike) -> dict:
    """What a file holds and what its bytes are for, as JSON values.

    `float_layers` {name: bytes} are weights without codes, `float_share` is their part of the float32 network.
    Per layer bytes, `mask_entropy` in bits per weight and `code_entropy` in bits per kept weight (zero order).
    """
    data = container.read_file(path)
    mode, model, sizes, found = _open(data, str(path))
    return {
        "version": container.VERSION, "mode": mode, "bytes": len(data), "split": asdict(sizes),
        "layers": [_describe(name, model.weights[name], *about) for name, about in found.items()],
        "rest": {name: list(tensor.shape) for name, tensor in model.rest.items()},
        "float_layers": float_layers(model), "float_share": float_share(model),
        "activations": len(model.activations), "windows": len(model.windows), "ranges_by": model.ranges_by,
    }


def to_bytes(compressed: CompressedModel, *, mode: str = "best",
             index_bits: int | str | Mapping[str, int] = 5) -> tuple[bytes, Sizes]:
    """(a whole file, its bytes by purpose). Arguments as in `encode`."""
    if mode not in blocks.CODERS:
        raise ConfigError(f"mode = {mode!r}: allowed is {', '.join(map(repr, blocks.CODERS))}")
    widths, packed, layers = _index_widths(index_bits, list(compressed.weights)), [], []
    for name, tensor in compressed.weights.items():
        block, layer = blocks.pack_tensor(tensor, mode, widths[name])
        packed.append(block)
        layers.append(layer)
    header = container.pack_header(compressed)
    activations = container.pack_activations(compressed, header)
    rest = pack_rest(compressed.rest, mode)
    data = container.frame(mode, header, b"".join([*packed, activations, rest]))
    container.check_header(header, container.max_elements(len(data)))
    sizes = _sizes(layers, len(rest), len(activations), len(container.frame(mode, header, b"")))
    assert sizes.total == len(data)
    return data, sizes


def from_bytes(data: bytes, name: str = "the data", *, max_elements: int | None = None) -> CompressedModel:
    """The model in the bytes of a file; `name` is for the FormatError, `max_elements` as in `decode`."""
    return _open(data, name, max_elements)[1]


def _open(data: bytes, name: str, limit: int | None = None
          ) -> tuple[str, CompressedModel, Sizes, dict[str, tuple[blocks.Layer, str]]]:
    try:
        return _parse(data, limit)
    except CompressError as error:  # names in the file may hold line ends
        raise FormatError(f"{name}: {' '.join(str(error).split())}") from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError) as error:
        raise FormatError(f"{name}: the content cannot be read ({type(error).__name__})") from error


def _parse(data: bytes, limit: int | None) -> tuple[str, CompressedModel, Sizes, dict[str, tuple[blocks.Layer, str]]]:
    """(mode, model, bytes by purpose, {layer: its bytes and coder})."""
    mode, found, reader = container.unframe(data)
    header = container.check_header(found, container.max_elements(len(data), limit))
    weights, layers, frame = {}, {}, len(data) - reader.left()
    for name, shape, bits in header["w"]:
        weights[name], *layers[name] = blocks.read_tensor(reader, shape, bits)
    start = reader.left()
    activations, windows = container.read_activations(reader, found)
    middle = reader.left()
    rest = read_rest(reader, header)
    model = CompressedModel(weights, rest, activations, windows, container.topology(header),
                            "harness" if header["h"] else "method")
    return mode, model, _sizes([layer for layer, _ in layers.values()], middle, start - middle, frame), layers


def _sizes(layers: list[blocks.Layer], rest: int, activations: int, header: int) -> Sizes:
    codes, positions, codebooks = (sum(getattr(layer, part) for layer in layers)
                                   for part in ("codes", "positions", "codebook"))
    return Sizes(codes, positions, codebooks, rest, activations, header)


def _index_widths(index_bits: int | str | Mapping[str, int], layers: list[str]) -> dict[str, list[int]]:
    """{layer: widths to try}."""
    if index_bits == "auto":
        return dict.fromkeys(layers, list(blocks.AUTO))
    given = index_bits if isinstance(index_bits, Mapping) else dict.fromkeys(layers, index_bits)
    if set(given) != set(layers):
        raise ConfigError(f"index_bits must name the layers {', '.join(layers)}, not {', '.join(map(str, given))}")
    wrong = [bits for bits in given.values() if type(bits) is not int or bits not in blocks.INDEX_BITS]
    if wrong:
        raise ConfigError(f"index_bits = {wrong[0]!r}: allowed is 'auto' or a whole number in 1..16")
    return {layer: [bits] for layer, bits in given.items()}


def _describe(name: str, tensor: CompressedTensor, layer: blocks.Layer, coder: str) -> dict:
    values, pruned = blocks.values_of(tensor)
    mask = values != pruned
    return {"name": name, "shape": list(tensor.codes.shape), "bits": tensor.bits,
            "grid": type(tensor.grid).__name__.lower(), "kept": tensor.kept, "density": tensor.density,
            "coder": coder, "bytes": asdict(layer),
            "mask_entropy": coding.entropy(mask.astype(np.int8)), "code_entropy": coding.entropy(values[mask])}
