"""An integer network as an ONNX graph of 8-bit integers, from the codes and ranges of the file.

The graph has the form that engines look for (QDQ): a value that is read under a quantizer goes through
QuantizeLinear and DequantizeLinear, weights are int8 with a scale per output channel, biases int32 in units of the
accumulators. A batch norm that an integer layer takes along is in its scales and bias. Sums of accumulators (see
`exact`) stay real in between, as they are here: OpenVINO keeps such a conv and add in integers, ONNX Runtime runs that
conv in float. `residual = "int8"` rounds the accumulators to 8-bit codes too, on a range outside which the sum is
clipped anyway.

Differs from the integers here: the engine rounds the bias to a whole accumulator, and requantizes in its own order of
operations; now and then a code differs by one. A deep network makes more of it, as much as its rounding does at all;
`arithmetic = "exact"` (see `spelled`) has no such code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...core.artifact import ActivationQuantizer, CompressedModel
from ...core.errors import ConfigError, GraphError
from ...core.file.container import write_file
from ...core.graph.graph import Node
from ..exact import REAL, IntegerLayer, IntegerNetwork
from . import operations
from .spelled import Spelled
from .walk import Walk
from .writer import BIAS_LIMIT, OPSETS, Writer

RESIDUALS, WINDOWS, ARITHMETICS = ("float", "int8"), ("refuse", "drop"), ("qdq", "exact")
FLOAT = "float32"


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the file, and how each layer's weight is stored in it (int4, int8, float32; in C the
    type of its codes)."""

    bytes: int
    layers: dict[str, str]


def to_onnx(compressed: CompressedModel, skeleton: nn.Module, path: str | Path, shape: tuple[int, ...], *,
            opset: int = 13, residual: str = "float", windows: str = "refuse", arithmetic: str = "qdq",
            float_policy: tuple[str, ...] = ()) -> Exported:
    """Write the integer network of `compressed` for inputs [N, *shape] to `path`, N any.

    opset     13: weights of up to 8 bits as int8; 21: those of up to 4 bits as int4 (a smaller file; ONNX Runtime
              then multiplies in float), activations of up to 16 bits
    residual  "float" or "int8": the accumulators that an add takes
    windows   "refuse" or "drop" SPARQ's bit windows, which ONNX has no operation for
    arithmetic  "qdq", which engines run in integers of their own, or "exact": the codes that it has here, spelled out
              in float32 (see `spelled`); `residual` is then "float"
    A weight on a table or grid that 8 bits do not hold exactly is stored as float32, and named so in the result.
    On x86 CPUs without VNNI ONNX Runtime's sums saturate, and outputs can be far off, unless the session's options say
    `add_session_config_entry("session.x64quantprecision", "1")`, as those of `onnx_session` do.
    Raises GraphError naming the operation that has no ONNX form, or an input or output that is not one tensor of real
    numbers; ConfigError for an option, a missing package, or a shape that the network cannot take.

    >>> import tempfile
    >>> from ...core.artifact import Affine, CompressedTensor
    >>> from ...core.graph.build import assemble
    >>> net = nn.Sequential(nn.Linear(2, 1))
    >>> ternary = CompressedTensor.of(torch.tensor([[-1, 1]]), Affine(torch.ones(1), torch.zeros(1).int()), 2)
    >>> made = assemble(net, {"0": ternary}, activations={"0": ActivationQuantizer(scale=0.1, zero=128)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_onnx(made, net, Path(folder) / "net.onnx", (2,)).layers
    {'0': 'int8'}
    """
    for name, value, allowed in (("opset", opset, OPSETS), ("residual", residual, RESIDUALS),
                                 ("windows", windows, WINDOWS), ("arithmetic", arithmetic, ARITHMETICS)):
        if value not in allowed:
            raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(map(str, allowed))}")
    if compressed.windows and windows == "refuse":
        raise GraphError(f"the input of {next(iter(compressed.windows))} goes through a bit window, which ONNX has no "
                         "operation for: windows='drop' exports plain 8-bit activations")
    network = IntegerNetwork(CompressedModel(compressed.weights, compressed.rest, compressed.activations, {},
                                             compressed.topology), skeleton, float_policy)
    if arithmetic == "exact" and residual != "float":
        raise ConfigError(f"residual = {residual!r}: arithmetic = 'exact' rounds no sums, 'float' is allowed")
    export = Spelled(network, Writer(opset)) if arithmetic == "exact" else _Quantized(network, Writer(opset),
                                                                                      residual == "int8")
    data = export.model(shape).SerializeToString()
    write_file(path, data)
    return Exported(len(data), export.stored)


class _Quantized(Walk):
    """A value has one ONNX tensor for each form in which it is read."""

    def __init__(self, network: IntegerNetwork, writer: Writer, rounds_sums: bool):
        super().__init__(network, writer)
        self.rounds_sums = rounds_sums

    def emit(self, node: Node) -> str:
        network = self.network
        if node.op == "input":
            return "input"
        if node.name in network.fused:
            return self.reals[node.inputs[0]]
        if node.name in network.layers:
            return self._layer(network.layers[node.name])
        return self.with_norm(node, operations.find(node)(self.write, node, self._inputs(node), self.facts(node)))

    def _inputs(self, node: Node) -> list[str]:
        """What a node reads; one that moves codes reads those of its readers, if all read the same."""
        wanted = self.network.wanted[node.name]
        if node.op in operations.MOVING and len(wanted) == 1:
            return [self._read(name, wanted[0]) for name in node.inputs]
        edges = node.edges()
        if not edges:
            return [self.reals[name] for name in node.inputs]
        return [self._at(edge, name) for edge, name in zip(edges, node.inputs, strict=True)]

    def _read(self, name: str, form) -> str:
        """The value `name` in a form: real, or rounded to codes."""
        rounded = isinstance(form, ActivationQuantizer)
        return self.write.through_codes(self.reals[name], form) if rounded else self.reals[name]

    def _at(self, edge: str, name: str) -> str:
        """What is read at an edge."""
        if edge not in self.network.pending:
            return self._read(name, self.network._form(edge))
        return self._read(name, self._range_of_sum(edge) if self.rounds_sums else REAL)

    def _range_of_sum(self, edge: str) -> ActivationQuantizer:
        """8-bit codes for the accumulators at an edge: beyond them the sum leaves the range of all that read it."""
        add = self.graph.nodes[edge.rpartition(":")[0]]
        others = [self.network.ranges[other] for other in add.edges() if other != edge]
        readers = [form for form in self.network.wanted[add.name] if isinstance(form, ActivationQuantizer)]
        if len(others) != 1 or not readers or len(readers) < len(self.network.wanted[add.name]):
            raise GraphError(f"the sum {add.name} is read as a real number: residual = 'int8' knows no range for it")
        ends = [[(code - form.zero) * form.scale for code in form.code_range] for form in (*readers, others[0])]
        low = min(end[0] for end in ends[:-1]) - ends[-1][1]
        high = max(end[1] for end in ends[:-1]) - ends[-1][0]
        scale = (high - low) / 255
        return ActivationQuantizer(scale, min(max(round(-low / scale), 0), 255))

    def _layer(self, layer: IntegerLayer) -> str:
        """A conv or linear on codes, with integer weights and bias."""
        node, name = layer.node, layer.node.name
        integers, unit = layer.weight.integers, layer.gain  # a unit may be negative, where a batch norm's factor is
        dead = (unit == 0) | (integers.flatten(1) == 0).all(1)
        integers = torch.where(dead.reshape(-1, *[1] * (integers.ndim - 1)), torch.zeros_like(integers), integers)
        least = layer.shift.abs() / BIAS_LIMIT  # of a unit, so that the bias is an int32
        unit = torch.where(dead, torch.maximum(least * 2, torch.full_like(unit, layer.source.scale)), unit)
        scale = unit / layer.source.scale
        transposed = isinstance(node.module, nn.Linear)
        stored = integers.T if transposed else integers
        weight, kind = self.write.weight(stored, scale, 1 if transposed else 0, self.write.opset >= 21)
        self.stored[name] = kind
        exact = kind != FLOAT and bool((unit.abs() >= least).all())
        bias = self.write.bias(layer.shift, unit.float()) if exact else self.write.real(layer.shift)
        x = self._read(node.inputs[0], layer.source)
        return operations.multiply(self.write, node, x, weight, bias, self.facts(node))
