"""Compressed models as files: `encode`, `decode`, `load`, `inspect`.

Mode "paper" is Deep Compression's format (sections 2 and 4): of every tensor the relative positions and the codes
of the stored entries, fillers included, each stream in a canonical Huffman code whose table is in the file, or at
fixed width where that is smaller. Mode "best" takes per tensor the smallest of three layouts (dense symbols; bit
mask and codes; relative positions and codes, by row or by column), each stream range coded, Huffman coded or at
fixed width, and shrinks what stays float with LZMA.

    header   {"w": [[layer, shape, bits]], "r": [[name, shape]], "t": {name: dtype other than float32},
              "f": folded, "s": widths, "h": 1 if the harness chose the ranges}; empty parts are left out
    payload  per tensor (grid, layout[1], streams); activations; rest
"""

import lzma
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from . import coding, container
from .artifact import (
    MAX_BITS,
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Grid,
    Levels,
    Topology,
    Window,
)
from .build import apply
from .container import Reader, decode_stream, encode_stream, varint
from .errors import CompressError, ConfigError, FormatError

INDEX_BITS = range(1, 17)
AUTO = range(2, 9)
CODERS = {"paper": ("packed", "huffman"), "best": ("packed", "huffman", "range")}
LAYOUTS = ("dense", "mask", "gap rows", "gap columns")
DENSE, MASK, GAP_ROWS, GAP_COLUMNS = range(4)  # a gap layout adds its index bits << 2
AFFINE, LEVELS, CODEBOOK = range(3)  # the kind of a grid, to which these flags are added:
PER_CHANNEL, HAS_ZEROS, UNSIGNED = 4, 8, 16
HEADER = {"w": [(str, [int], int)], "r": [(str, [int])], "t": {str: str}, "f": {str: str}, "s": {str: (int, int)},
          "h": int}
ACTIVATIONS = (int, [(str, int, int, int)], [(str, int, [int], int)])
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}
SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 2}]


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
    """Write `compressed` (all but its notes) to `path` in one step, and say what the bytes are for.

    mode        "best" or "paper", see above
    index_bits  bits of a relative position, 1..16: a number, {layer: number}, or "auto", the smallest of 2..8 per
                layer. Mode "best" tries 2..8 besides.
    Raises ConfigError for another argument, CompressError where the file cannot be written.
    """
    data, sizes = to_bytes(compressed, mode=mode, index_bits=index_bits)
    container.write_file(path, data)
    return sizes


def decode(path: str | os.PathLike) -> CompressedModel:
    """The model that `encode` wrote, bit for bit, without notes; FormatError for any other file."""
    return from_bytes(container.read_file(path), str(path))


def load(path: str | os.PathLike, skeleton: nn.Module) -> nn.Module:
    """The network in a file: `apply(decode(path), skeleton)`."""
    return apply(decode(path), skeleton)


def inspect(path: str | os.PathLike) -> dict:
    """What a file holds and what its bytes are for, as JSON values.

    Per layer the bytes, `mask_entropy` in bits per weight and `code_entropy` in bits per kept weight (zero order).
    """
    data = container.read_file(path)
    mode, model, sizes, layers = _open(data, str(path))
    return {
        "version": container.VERSION, "mode": mode, "bytes": len(data), "split": asdict(sizes),
        "layers": [_describe(name, model.weights[name], about) for name, about in layers.items()],
        "rest": len(model.rest), "activations": len(model.activations), "windows": len(model.windows),
        "ranges_by": model.ranges_by,
    }


def to_bytes(compressed: CompressedModel, *, mode: str = "best",
             index_bits: int | str | Mapping[str, int] = 5) -> tuple[bytes, Sizes]:
    """A whole file, and its bytes by purpose. Arguments as in `encode`."""
    if mode not in CODERS:
        raise ConfigError(f"mode = {mode!r}: allowed is {', '.join(map(repr, CODERS))}")
    widths = _index_widths(index_bits, list(compressed.weights))
    blocks, layers = [], []
    for layer, tensor in compressed.weights.items():
        block, about = _pack_tensor(tensor, mode, widths[layer])
        blocks.append(block)
        layers.append(about)
    header = _pack_header(compressed)
    activations = _pack_activations(compressed, container.json_bytes(header))
    rest = _pack_rest(compressed.rest, mode)
    data = container.frame(mode, header, b"".join([*blocks, activations, rest]))
    elements = sum(max(t.numel(), 1) for t in [*(t.codes for t in compressed.weights.values()), *compressed.rest.values()])
    if elements > container.max_elements(len(data)):
        raise CompressError(f"{elements} values in {len(data)} bytes: no file is allowed to expand so far")
    return data, _sizes(layers, len(rest), len(activations), len(data))


def from_bytes(data: bytes, name: str = "the data") -> CompressedModel:
    """The model in the bytes of a file; `name` is for the message of the FormatError."""
    return _open(data, name)[1]
