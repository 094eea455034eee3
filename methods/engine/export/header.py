"""A compressed network as a C header: plain arrays, for programs on a microcontroller and courses about them.

The names of all arrays begin with the file's; what follows are names of the network with _ for what C does not allow.
Arrays are flat and in torch's order. Of a layer with codes:

    codes           the file's, one or two bytes each
    scale, zero     [out] or [1]    affine grid: weight = scale * (code - zero)
    scale, levels   [out] or [1]    levels:      weight = scale * levels[code]
    table                           codebook:    weight = table[code]
    shape           of the weight: [out, in / groups, height, width] or [out, in]
    window          of a Conv2d: stride (2), padding (top, left, bottom, right), dilation (2), groups
    factor, offset  [out]           output = factor * (sum of weight * input) + offset: bias and batch norm

A pruned weight has the code that means 0; where a grid has none, its last level or entry is an added 0. An edge whose
activations are quantized has step and code: {zero point, lowest, highest}; code = clamp(round(x / step) + zero point).
A step is a double, as it is in the file; other real numbers are floats.
Everything else of the file follows as it is: biases and batch norms that no layer above takes along, layers in float.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.artifact import Affine, CompressedModel, CompressedTensor, Levels
from ...core.errors import CompressError, ConfigError, GraphError
from ...core.file.container import write_file
from ...core.graph.build import apply
from ...core.graph.fold import norm_ratio
from ...core.graph.graph import Graph, Node, trace
from .facts import pair
from .onnx import Exported
from .operations import conv_pads

PER_LINE = 16
C_TYPES = {torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "uint8_t", torch.int16: "int16_t"}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_c_header(compressed: CompressedModel, skeleton: nn.Module, path: str | Path, *,
                windows: str = "refuse") -> Exported:
    """Write `compressed` as C99 to `path`; the result says in which type the codes of each layer are.

    windows  "refuse" or "drop" SPARQ's bit windows, which are no arrays
    Raises ConfigError for a file name that C cannot have, CompressError naming a tensor that C has no literals for
    (empty, not finite, integers of more than 32 bits) or whose C name is taken, GraphError for a conv that pads with
    anything but zeros.

    >>> import tempfile
    >>> from ...core.graph.build import assemble
    >>> net = nn.Sequential(nn.Linear(2, 1))
    >>> ternary = CompressedTensor.of(torch.tensor([[-1, 1]]), Affine(torch.ones(1), torch.zeros(1).int()), 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_c_header(assemble(net, {"0": ternary}), net, Path(folder) / "net.h").layers
    ...     [line for line in (Path(folder) / "net.h").read_text().splitlines() if "_codes[" in line]
    {'0': 'int8_t'}
    ['static const int8_t net_0_codes[2] = {-1, 1};']
    """
    if windows not in ("refuse", "drop"):
        raise ConfigError(f"windows = {windows!r}: allowed are refuse, drop")
    if compressed.windows and windows == "refuse":
        raise GraphError(f"the input of {next(iter(compressed.windows))} goes through a bit window, which a header has "
                         "no arrays for: windows='drop' leaves plain activations")
    prefix = _c_name(Path(path).stem)
    if not re.match(r"[A-Za-z_]", prefix):
        raise ConfigError(f"{path}: the arrays are called after the file, and a name in C begins with a letter")
    header = _Header(prefix)
    for name, values in _arrays(compressed, apply(compressed, skeleton)):
        header.add(name, values)
    data = header.text().encode()
    write_file(path, data)
    return Exported(len(data), {layer: header.types[f"{layer}.codes"] for layer in compressed.weights})


def _arrays(compressed: CompressedModel, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of everything that is written, in its order."""
    graph, state = trace(module), dict(compressed.rest)
    for name, tensor in compressed.weights.items():
        yield from ((f"{name}.{part}", values) for part, values in _of_weight(tensor))
        node = graph.nodes.get(name)
        if node is not None and node.op in ("conv", "linear") and _is_called_once(graph, node):
            yield from ((f"{name}.{part}", values) for part, values in _of_layer(graph, node, tensor))
            norm = graph.norm_after(name)
            for taken in (f"{name}.bias", *(f"{norm}.{part}" for part in NORM)):
                state.pop(taken.removeprefix("."), None)
    for edge, quantizer in compressed.activations.items():
        yield f"{edge}.step", torch.tensor([quantizer.scale], dtype=torch.float64)
        yield f"{edge}.code", torch.tensor([quantizer.zero, *quantizer.code_range])
    yield from ((name, values) for name, values in state.items() if not name.endswith("num_batches_tracked"))


def _is_called_once(graph: Graph, node: Node) -> bool:
    return sum(other.module is node.module for other in graph) == 1


def _of_weight(tensor: CompressedTensor) -> Iterator[tuple[str, Tensor]]:
    grid, codes = tensor.grid, tensor.codes
    if isinstance(grid, Affine):
        low, high = grid.code_range(tensor.bits)
        yield "codes", codes.to(_narrowest(low, high))
        yield "scale", grid.scale.reshape(-1)
        yield "zero", grid.zero.reshape(-1)
    else:
        values = grid.levels if isinstance(grid, Levels) else grid.values
        if not grid.has_zero() and not bool(tensor.mask.all()):
            codes = torch.where(tensor.mask, codes, len(values))
            values = torch.cat([values, values.new_zeros(1)])
        yield "codes", codes.to(_narrowest(0, len(values) - 1))
        if isinstance(grid, Levels):
            yield "scale", grid.scale.reshape(-1)
        yield ("levels" if isinstance(grid, Levels) else "table"), values
    yield "shape", torch.tensor(tensor.codes.shape)


def _of_layer(graph: Graph, node: Node, tensor: CompressedTensor) -> Iterator[tuple[str, Tensor]]:
    layer, norm = node.module, graph.norm_after(node.name)
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            raise GraphError(f"layer {node.name} pads with {layer.padding_mode}: a header knows zeros only")
        yield "window", torch.tensor([*pair(layer.stride), *conv_pads(layer), *pair(layer.dilation), layer.groups])
    offset = torch.zeros(len(tensor.codes)) if layer.bias is None else layer.bias.detach()
    factor, offset = torch.ones(len(tensor.codes), dtype=torch.float64), offset.double()
    if norm is not None:
        batch_norm = graph.nodes[norm].module
        factor = norm_ratio(batch_norm)
        offset = (offset - batch_norm.running_mean.double()) * factor
        offset = offset + batch_norm.bias.detach().double() if batch_norm.affine else offset
    yield "factor", factor.float()
    yield "offset", offset.float()


def _narrowest(low: int, high: int) -> torch.dtype:
    fits = (kind for kind in (torch.int8, torch.uint8, torch.int16, torch.int32)
            if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max)
    return next(fits)


def _c_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


class _Header:
    """The arrays so far: `types` {name: C type}, `taken` {C name: name}."""

    def __init__(self, prefix: str):
        self.prefix, self.lines = prefix, []
        self.types: dict[str, str] = {}
        self.taken: dict[str, str] = {}

    def add(self, name: str, values: Tensor) -> None:
        called = _c_name(f"{self.prefix}.{name.lstrip('.')}")
        if called in self.taken:
            raise CompressError(f"tensors {self.taken[called]} and {name} would both be called {called} in C")
        kind, literal = _literals(name, values)
        self.types[name], self.taken[called] = kind, name
        numbers = values.detach().reshape(-1).tolist()
        rows = [", ".join(map(literal, numbers[i:i + PER_LINE])) for i in range(0, len(numbers), PER_LINE)]
        body = f"{{{rows[0]}}}" if len(rows) == 1 else "{\n    " + ",\n    ".join(rows) + "\n}"
        self.lines.append(f"static const {kind} {called}[{len(numbers)}] = {body};")

    def text(self) -> str:
        guard = f"{self.prefix.upper()}_H"
        told = "".join(f" * {line}".rstrip() + "\n" for line in __doc__.splitlines()[2:])
        return (f"/* A compressed network, written by jointcompress.\n{told} */\n#ifndef {guard}\n#define {guard}\n\n"
                "#include <stdint.h>\n\n" + "\n".join(self.lines) + f"\n\n#endif /* {guard} */\n")


def _literals(name: str, values: Tensor) -> tuple[str, Callable[[float], str]]:
    """The C type of a tensor, and how a value is written so that it is the same number again."""
    if not values.numel():
        raise CompressError(f"tensor {name} is empty: C has no arrays of length 0")
    if values.is_floating_point():
        if not bool(values.isfinite().all()):
            raise CompressError(f"tensor {name} is not finite: C has no literals for that")
        return ("double", _double) if values.dtype == torch.float64 else ("float", _float)
    low, high = int(values.min()), int(values.max())
    if low < -2**31 or high >= 2**31:
        raise CompressError(f"tensor {name} holds {low}..{high}: a header holds integers of 32 bits")
    return C_TYPES.get(values.dtype, "int32_t"), lambda value: str(int(value))


def _double(value: float, digits: int = 17) -> str:
    word = f"{value:.{digits}g}"
    return word if "." in word or "e" in word else f"{word}.0"


def _float(value: float) -> str:
    return f"{_double(value, 9)}f"
