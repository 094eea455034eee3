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

from torch import nn

from ..artifact import CompressedModel, check_compressed
from ..errors import ConfigError
from ..graph.build import apply, tensors_of
from ..graph.wrapped import check_network
from . import blocks, container, layouts
from .describe import Sizes, damage_named, inspect, sizes_of
from .rest import pack_rest, read_rest

__all__ = ["Sizes", "decode", "encode", "from_bytes", "inspect", "load", "to_bytes"]

# --- the API -----------------------------------------------------------------------------------------------


def encode(compressed: CompressedModel, path: str | os.PathLike, *, mode: str = "best",
           index_bits: int | str | Mapping[str, int] = 5) -> Sizes:
    """Write `compressed`, all but its notes, to `path` in one step, and say what the bytes are for.

    mode        "best" or "paper", see above
    index_bits  bits of a relative position, 1..16: a number, {layer: number}, or "auto", the smallest of 2..8 for
                each layer. Mode "best" tries 2..8 besides.
    Raises ConfigError for other arguments, CompressError where the file cannot be written.
    """
    check_compressed(compressed, "encode(compressed, path)")
    _check_path(path)
    data, sizes = to_bytes(compressed, mode=mode, index_bits=index_bits)
    container.write_file(path, data)
    return sizes


def decode(path: str | os.PathLike, *, max_elements: int | None = None) -> CompressedModel:
    """The model that `encode` wrote, bit for bit, without notes; FormatError for anything else.

    max_elements  numbers that the file may hold, checked before any memory is taken; default 2^24, or 2^10 for each
                  byte of the file if that is more
    """
    _check_path(path)
    return from_bytes(container.read_file(path), str(path), max_elements=max_elements)


def load(path: str | os.PathLike, skeleton: nn.Module) -> nn.Module:
    """The network in a file: `apply(decode(path), skeleton)`; the file may hold no more than the skeleton can."""
    check_network(skeleton)
    parts = tensors_of(skeleton).values()
    room = sum(tensor.numel() for tensor in parts) + sum(len(t) for t in parts if t.ndim)  # a fold adds biases
    return apply(decode(path, max_elements=room), skeleton)


def to_bytes(compressed: CompressedModel, *, mode: str = "best",
             index_bits: int | str | Mapping[str, int] = 5) -> tuple[bytes, Sizes]:
    """(a whole file, its bytes by purpose). Arguments as in `encode`."""
    if mode not in layouts.CODERS:
        raise ConfigError(f"mode = {mode!r}: allowed is {', '.join(map(repr, layouts.CODERS))}")
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
    sizes = sizes_of(layers, len(rest), len(activations), len(container.frame(mode, header, b"")))
    assert sizes.total == len(data)
    return data, sizes


def file_bytes(compressed: CompressedModel) -> int:
    """Bytes of the file that `encode` writes."""
    return len(to_bytes(compressed)[0])


def from_bytes(data: bytes, name: str = "the data", *, max_elements: int | None = None) -> CompressedModel:
    """The model in the bytes of a file; `name` is for the FormatError, `max_elements` as in `decode`."""
    with damage_named(name):
        return _parse(data, max_elements)


def _parse(data: bytes, limit: int | None) -> CompressedModel:
    _, found, reader = container.unframe(data)
    header = container.check_header(found, container.max_elements(len(data), limit))
    weights = {name: blocks.read_tensor(reader, shape, bits) for name, shape, bits in header["w"]}
    activations, windows = container.read_activations(reader, found)
    return CompressedModel(weights, read_rest(reader, header), activations, windows, container.topology(header),
                           "harness" if header["h"] else "method")


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"a {type(path).__name__} was given where the path of a file belongs: allowed is a str or a "
                          "Path")


def _index_widths(index_bits: int | str | Mapping[str, int], layers: list[str]) -> dict[str, list[int]]:
    """{layer: widths to try}."""
    if index_bits == "auto":
        return dict.fromkeys(layers, list(layouts.AUTO))
    given = index_bits if isinstance(index_bits, Mapping) else dict.fromkeys(layers, index_bits)
    if set(given) != set(layers):
        raise ConfigError(f"index_bits must name the layers {', '.join(layers)}, not {', '.join(map(str, given))}")
    wrong = [bits for bits in given.values() if type(bits) is not int or bits not in layouts.INDEX_BITS]
    if wrong:
        raise ConfigError(f"index_bits = {wrong[0]!r}: allowed is 'auto' or a whole number in 1..16")
    return {layer: [bits] for layer, bits in given.items()}
