"""A compressed model run in integer arithmetic.

Activations are integer codes, weights are integers, accumulators are exact. Where a value is produced (by a
conv, linear, add, average pool, or at the input) it is requantized once for every quantizer that reads it, from
its terms, in float32, to the nearest even:

    code = clamp(round((t0 * m0 + b) + t1 * m1))      m_i = gain_i / scale_out,  b = (shift / scale_out) + zero_out

with m1, the factor of an added code, on 16 significant bits: its product with an 8-bit code is exact in float32, so
that engines which fuse the multiplication with the addition agree with those which do not.

A conv or linear has one term, its accumulators, with gain scale_in * scale_w * gamma / sqrt(var + eps): a batch
norm that follows costs nothing. An add has two: codes of its inputs on their own scales, or, for the edge that
`Graph.accumulator_edges` names, the accumulators of the conv before it, which are never rounded to codes. Clamps,
and what moves or joins values, act on codes. What has no codes (a layer excluded by the method or by the caller's
policy, or whose input has no quantizer) runs in float and is listed in `float_nodes`, as are a batch norm that follows
no conv or linear of its own, and the operations that the table in `core/graph/operations.py` gives real values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.artifact import ActivationQuantizer, CompressedModel, Window
from ..core.errors import GraphError
from ..core.fit.windows import is_elementwise
from ..core.graph.build import apply
from ..core.graph.fold import norm_ratio
from ..core.graph.graph import Graph, Node, trace
from ..core.graph.operations import REAL as NEEDS_REAL
from ..core.graph.operations import SUMS
from .accumulate import accumulate, exact_dtype
from .pooling import has_even_windows, window_size
from .weights import IntegerWeight, integer_weight
from .windowed import accumulate_windowed, check_window, windowed_codes


@dataclass(frozen=True)
class Terms:
    """A value as t0 * gain0 + shift (+ t1 * gain1): integers held in float32, factors in float64 ([C] or []).

    last  the channels are the last dimension (of a linear), not dimension 1
    """

    tensors: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    shift: Tensor
    last: bool = False

    def scaled(self, step: float, zero: int) -> Tensor:
        """float32 (t0 * m0 + b) + t1 * m1 in units of `step`, with `zero` added."""
        t = self.tensors
        shape = (-1,) if self.last else (1, -1, *[1] * (t[0].ndim - 2))
        y = t[0] * _f32(self.gains[0] / step, t[0], shape) + _f32(self.shift / step + zero, t[0], shape)
        return y if len(t) == 1 else y + t[1] * _f32(short(self.gains[1] / step), t[1], shape)


def short(factor: Tensor) -> Tensor:
    """A float64 factor rounded to FACTOR_BITS significant bits."""
    significand, exponent = torch.frexp(factor)
    return torch.ldexp(torch.round(significand * 2**FACTOR_BITS), exponent - FACTOR_BITS)


Form = ActivationQuantizer | str  # in which form a value is read: codes of a quantizer, or one of
REAL, ACCUMULATORS = "real", "accumulators"
FACTOR_BITS = 16  # of an added code's factor
Forms = dict[Form, Tensor | Terms]


@dataclass(frozen=True)
class IntegerLayer:
    """A conv or linear with its integers and its real-valued epilogue y = acc * gain + shift (per channel)."""

    node: Node
    weight: IntegerWeight
    source: ActivationQuantizer
    gain: Tensor  # float64 [C_out]
    shift: Tensor  # float64 [C_out]
    dtype: torch.dtype
    window: Window | None = None

    def read(self, codes: Tensor) -> Tensor:
        """The codes after a window, where that is a function of the codes alone."""
        many = self.node.op == "linear" and self.window is None  # a linear takes any number of rows
        if codes.ndim != self.weight.integers.ndim and not many:
            raise GraphError(f"{self.node.name} reads inputs of {codes.ndim} dimensions: the integer kernels take "
                             f"{self.weight.integers.ndim} there")
        return windowed_codes(codes, self.window) if self._elementwise() else codes

    def _elementwise(self) -> bool:
        return self.window is not None and is_elementwise(self.window, self.weight.integers.shape[1])

    def accumulate(self, codes: Tensor) -> Tensor:
        """Sums over what `read` returned."""
        if self.window is not None and not self._elementwise():
            return accumulate_windowed(self.node.module, codes, self.weight.integers, self.window, self.dtype)
        return accumulate(self.node.module, codes - self.source.zero, self.weight.integers, self.dtype)


class IntegerNetwork:
    """Callable on a batch of real inputs; returns real outputs.

    compressed    with an activation quantizer at every edge that an integer layer reads
    skeleton      the float network it was made from
    float_policy  names of layers to run in float although they have codes (a paper's policy)
    built         the applied module and its graph, if somebody has them already
    """

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, float_policy: tuple[str, ...] = (), *,
                 built: tuple[nn.Module, Graph] | None = None):
        self.given = (compressed, skeleton, float_policy)
        self.module = apply(compressed, skeleton) if built is None else built[0]
        self.graph: Graph = trace(self.module) if built is None else built[1]
        self.ranges = compressed.activations
        unread = sorted(set(compressed.windows) - set(compressed.weights))
        if unread:
            raise GraphError(f"the edges {unread[:4]} have bit windows, but no layer with integer weights reads them")
        unknown = sorted(set(float_policy) - set(compressed.weights))
        if unknown:
            raise GraphError(f"no layers {unknown} to run in float; there are: {', '.join(compressed.weights)}")
        self.fused = {norm: node.name for node in self.graph.layers()
                      if (norm := self.graph.norm_after(node.name)) is not None}
        coded = [node for node in self.graph.layers() if node.name in compressed.weights]
        if coded and not any(node.name in self.ranges for node in coded):
            raise GraphError(f"the input of {coded[0].name} has no activation quantizer: calibrate, and encode "
                             "dataclasses.replace(c, activations=calibrate(apply(c, network), x)) of c = decode(path)")
        self.layers = {node.name: self._layer(node, compressed) for node in coded
                       if node.name in self.ranges and node.name not in float_policy}
        self.pending = self._pending()
        self.float_nodes = [node.name for node in self.graph if self._is_float(node)]
        self.wanted = {node.name: self._wanted(node.name) for node in self.graph}
        self.see: Callable[[IntegerLayer, Tensor, Tensor], None] | None = None  # (layer, codes in, accumulators)

    def _pending(self) -> dict[str, str]:
        """{edge: layer} of the adds that take a layer's accumulators; beside codes only."""
        found = {edge: layer for edge, layer in self.graph.accumulator_edges().items()
                 if layer in self.layers and edge not in self.ranges}
        return {edge: found[edge] for node in self.graph for edge in node.edges()
                if edge in found and all(other in self.ranges for other in node.edges() if other != edge)}

    def _layer(self, node: Node, compressed: CompressedModel) -> IntegerLayer:
        source = self.ranges[node.name]
        weight = integer_weight(compressed.weights[node.name])
        low, high = (code - source.zero for code in source.code_range)
        window = compressed.windows.get(node.name)
        if window is not None:
            check_window(node.name, node.module, source, weight.integers, window)
        ratio, shift = self._epilogue(node)
        return IntegerLayer(node, weight, source, weight.scale * ratio * source.scale, shift,
                            exact_dtype(weight.integers, low, high), window)

    def _epilogue(self, node: Node) -> tuple[Tensor, Tensor]:
        """float64 [C_out] ratio and shift of bias and batch norm: y = z * ratio + shift."""
        layer, norm_name = node.module, self.graph.norm_after(node.name)
        channels = layer.weight.shape[0]
        bias = torch.zeros(channels, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
        if norm_name is None:
            return torch.ones_like(bias), bias
        norm = self.graph.nodes[norm_name].module
        ratio = norm_ratio(norm)
        shift = (bias - norm.running_mean.double()) * ratio
        return ratio, shift + norm.bias.detach().double() if norm.affine else shift

    def _is_float(self, node: Node) -> bool:
        if node.kind.acts == NEEDS_REAL:
            return node.op != "input" and node.name not in self.fused
        if node.kind.acts != SUMS:
            return False
        if node.op in ("conv", "linear"):
            return node.name not in self.layers
        return not all(edge in self.ranges or edge in self.pending for edge in node.edges())

    def _form(self, edge: str) -> Form:
        """The form in which the value at an edge is read."""
        return ACCUMULATORS if edge in self.pending else self.ranges.get(edge, REAL)

    def _wanted(self, name: str) -> list[Form]:
        """The forms in which the value `name` is read, in order of first use."""
        found: list[Form] = [REAL] if name == self.graph.output else []
        for node in self.graph.consumers(name):
            if node.on_codes or node.name in self.fused:
                found += self._wanted(node.name)
            else:
                found += [self._form(edge) for edge, source in zip(node.edges(), node.inputs, strict=False)
                          if source == name] or [REAL]
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        values: dict[str, Forms] = {}
        shapes: dict[str, torch.Size] = {}
        for node in self.graph:
            values[node.name] = self._step(node.at(shapes), x, values)
            if self.graph.needs_shape(node.name):
                shapes[node.name] = shape_of(values[node.name])
            for name in node.inputs:  # free what nobody reads any more
                if name != self.graph.output and self.graph.consumers(name)[-1].name == node.name:
                    values.pop(name, None)
        return values[self.graph.output][REAL]

    def _step(self, node: Node, x: Tensor, values: dict[str, Forms]) -> Forms:
        inputs = [values[name] for name in node.inputs]
        if node.op == "input":
            return self._from_real(node, x)
        if node.name in self.fused:
            return inputs[0]
        if node.on_codes:
            return {form: on_codes(node, form, *(forms[form] for forms in inputs)) for form in self.wanted[node.name]}
        if node.name in self.float_nodes:
            return self._from_real(node, self._float(node, inputs))
        if node.op == "avgpool" and not has_even_windows(node.module, shape_of(inputs[0])):
            return self._from_real(node, self._float(node, inputs))
        terms = {"conv": self._multiplied, "linear": self._multiplied, "add": self._added, "avgpool": self._averaged}
        return self._from_terms(node, terms[node.op](node, inputs))

    def _multiplied(self, node: Node, inputs: list[Forms]) -> Terms:
        layer = self.layers[node.name]
        codes = layer.read(inputs[0][layer.source])
        total = layer.accumulate(codes)
        if self.see is not None:
            self.see(layer, codes, total)
        return Terms((total.float(),), (layer.gain,), layer.shift, node.op == "linear")

    def _added(self, node: Node, inputs: list[Forms]) -> Terms:
        """Accumulators first; a code c on a scale s with zero point z is c * s, and -z * s goes into the shift."""
        sides = [(edge, forms[self._form(edge)]) for edge, forms in zip(node.edges(), inputs, strict=True)]
        sides.sort(key=lambda side: side[0] not in self.pending)
        tensors, gains, shift, last = [], [], torch.zeros((), dtype=torch.float64), False
        for edge, value in sides:
            if isinstance(value, Terms):
                last = value.last
                tensors.append(value.tensors[0])
                gains.append(value.gains[0])
                shift = shift + value.shift
            else:
                quantizer = self.ranges[edge]
                tensors.append(value)
                gains.append(torch.tensor(quantizer.scale, dtype=torch.float64))
                shift = shift - quantizer.zero * quantizer.scale
        return Terms(tuple(tensors), tuple(gains), shift, last)

    def _averaged(self, node: Node, inputs: list[Forms]) -> Terms:
        """Average pool on codes: exact integer sums, then one multiplication."""
        quantizer = self.ranges[node.name]
        codes = (inputs[0][quantizer] - quantizer.zero).double()
        mean = node.run(codes)
        area = window_size(node.module, codes.shape, mean.shape)
        total = torch.round(mean * area)
        gain = torch.tensor(quantizer.scale / area, dtype=torch.float64)
        return Terms((total.float(),), (gain,), torch.zeros((), dtype=torch.float64))

    def _float(self, node: Node, inputs: list[Forms]) -> Tensor:
        """The real output of an operation in float, on inputs decoded where the edge is quantized.

        They are brought to one memory format: float kernels round differently in another.
        """
        real = []
        for edge, forms in zip(node.edges() or [None] * len(inputs), inputs, strict=True):
            form = REAL if edge is None else self._form(edge)
            real.append(_rows_first(forms[REAL] if form == REAL else form.decode(forms[form])))
        y = node.run(*real)
        norm = self.graph.norm_after(node.name) if node.op in ("conv", "linear") else None
        return y if norm is None else self.graph.nodes[norm].run(y)

    def _from_real(self, node: Node, y: Tensor) -> Forms:
        return {form: y if form == REAL else form.encode(y) for form in self.wanted[node.name]}

    def _from_terms(self, node: Node, terms: Terms) -> Forms:
        """Every wanted form of a value."""
        forms: Forms = {}
        for form in self.wanted[node.name]:
            if form == ACCUMULATORS:
                forms[form] = terms
            elif form == REAL:
                forms[form] = terms.scaled(1.0, 0)
            else:
                forms[form] = torch.round(terms.scaled(form.scale, form.zero)).clamp_(*form.code_range)
        return forms


def _rows_first(x: Tensor) -> Tensor:
    """`x` in torch's ordinary memory format, with its strides also where sides of 1 leave others possible."""
    return x.contiguous().view(-1).view(x.shape) if isinstance(x, Tensor) else x


def _f32(factor: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A float64 factor rounded once to float32, shaped to multiply `like`."""
    factor = factor.float().to(like.device)
    return factor.reshape(shape) if factor.ndim else factor


def shape_of(forms: Forms) -> torch.Size:
    """Of a value, from any of its forms."""
    value = next(iter(forms.values()))
    return value.tensors[0].shape if isinstance(value, Terms) else value.shape


def on_codes(node: Node, form: Form, *values):
    """What a clamp, or what moves or joins values, makes of them in one form; of codes held in a float dtype."""
    if node.op == "identity":  # a dropout: it may stand between a conv and an add, whose terms are no tensor
        return values[0]
    if form == REAL:
        return node.run(*values)
    if node.bounds is not None:
        return values[0].clamp(*code_bounds(node.bounds, form))
    if node.op == "pad":  # with real zeros
        return node.run(values[0] - form.zero) + form.zero
    return node.run(*values)


def code_bounds(bounds: tuple[float, float], form: ActivationQuantizer) -> tuple[int, int]:
    """The codes of the ends of a clamp: encoding never changes the order, so clamping codes is clamping values."""
    return tuple(int(form.encode(torch.tensor(end, dtype=torch.float32))) for end in bounds)
