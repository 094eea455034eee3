"""What a file holds and what its bytes are for, read without torch."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np

from ..errors import CompressError, FormatError
from ..quantizers import DTYPE_BYTES
from . import coding, container
from .layouts import GRIDS, Block, Layer, read_block

FLOATS = ("float32", "float16", "bfloat16", "float64")


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


def inspect(path: str | os.PathLike) -> dict:
    """What a file holds and what its bytes are for, as JSON values.

    `removed` are the residual blocks that the network is without.
    `float_layers` {name: bytes} are weights without codes, `float_share` is their part of the float32 network.
    Per layer bytes, `mask_entropy` in bits per weight and `code_entropy` in bits per kept weight (zero order).
    """
    data = container.read_file(path)
    with damage_named(str(path)):
        mode, found, reader = container.unframe(data)
        header = container.check_header(found, container.max_elements(len(data)))
        frame = len(data) - reader.left()
        blocks = [(name, shape, bits, read_block(reader, shape)) for name, shape, bits in header["w"]]
        start = reader.left()
        activations, windows = container.read_activations(reader, found)
    split = sizes_of([block.layer for *_, block in blocks], reader.left(), start - reader.left(), frame)
    sizes = {name: math.prod(shape) * DTYPE_BYTES[header["t"].get(name, "float32")] for name, shape in header["r"]}
    floats = {name: sizes[name] for name, shape in header["r"]
              if len(shape) > 1 and header["t"].get(name, "float32") in FLOATS}
    dense = sum(sizes.values()) + 4 * sum(math.prod(shape) for _, shape, _ in header["w"])
    return {
        "version": data[len(container.MAGIC)], "mode": mode, "bytes": len(data), "split": asdict(split),
        "layers": [_describe(*entry) for entry in blocks], "rest": dict(header["r"]), "removed": header["d"],
        "float_layers": floats, "float_share": sum(floats.values()) / max(dense, 1),
        "activations": len(activations), "windows": len(windows), "ranges_by": "harness" if header["h"] else "method",
    }


def _describe(name: str, shape: list[int], bits: int, block: Block) -> dict:
    mask = block.values != block.grid.pruned
    kept = int(mask.sum())
    return {"name": name, "shape": shape, "bits": bits, "grid": GRIDS[block.grid.kind], "kept": kept,
            "density": kept / max(len(mask), 1), "coder": block.coder, "bytes": asdict(block.layer),
            "mask_entropy": coding.entropy(mask.astype(np.int8)), "code_entropy": coding.entropy(block.values[mask])}


def sizes_of(layers: list[Layer], rest: int, activations: int, header: int) -> Sizes:
    codes, positions, codebooks = (sum(getattr(layer, part) for layer in layers)
                                   for part in ("codes", "positions", "codebook"))
    return Sizes(codes, positions, codebooks, rest, activations, header)


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Whatever reading damaged bytes raises, as a FormatError of one line that begins with `name`."""
    try:
        yield
    except CompressError as error:  # names in the file may hold line ends
        raise FormatError(f"{name}: {' '.join(str(error).split())}") from None
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError) as error:
        raise FormatError(f"{name}: the content cannot be read ({type(error).__name__})") from error
