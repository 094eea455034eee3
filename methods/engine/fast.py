"""The integer network on the int8 instructions of the CPU: bit for bit what `IntegerNetwork` computes, only faster.

Codes of up to 8 bits travel as bytes, code - lowest code, in channels_last memory. A conv or linear with its batch
norm, and the add that takes its accumulators, is one call of oneDNN (`onednn.py`). What has no fast form (layers run
in float, wider codes, uncommon pools) takes the step of `IntegerNetwork`, on codes in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.artifact import CompressedModel
from ..core.fit.windows import is_elementwise
from ..core.graph.graph import CODE_OPS, MAY_ALIAS, Graph, Node
from . import onednn
from .bytecodes import (
    digits_of,
    in_memory_order,
    is_narrow,
    on_bytes,
    rounded,
    summed,
    summed_at_once,
    to_bytes,
    to_float,
    top_byte,
    zero_byte,
)
from .exact import ACCUMULATORS, REAL, Form, Forms, IntegerLayer, IntegerNetwork, Terms, short
from .onednn import Int8Layer

ALIASES = ("relu", *MAY_ALIAS)  # may return the tensor that they were given


@dataclass(frozen=True)
class Pending:
    """Accumulators that an add will take: the conv has read its codes, but not yet multiplied."""

    layer: IntegerLayer
    codes: Tensor  # uint8, after a window


FastForms = dict[Form | tuple, Tensor | Terms | Pending]
Step = Callable[[list[FastForms]], FastForms]


class FastNetwork:
    """Called like `IntegerNetwork`, on CPU tensors; elsewhere, and where `backend` is "float", it is one.

    exact     the IntegerNetwork that defines every number
    steps     {node: its fast form}; what is missing there is done by `exact`
    Layers run in float get the same inputs in the same memory format, and so give the same numbers.
    """

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, float_policy: tuple[str, ...] = ()):
        self.exact = IntegerNetwork(compressed, skeleton, float_policy)
        self.graph: Graph = self.exact.graph
        self.layers, self.float_nodes = self.exact.layers, self.exact.float_nodes
        self.unsupported = onednn.unsupported()
        self.steps: dict[str, Step] = {}
        if not self.unsupported:
            self._compile()
        used = {node.name: self.graph.consumers(node.name) for node in self.graph}
        self.done = {node.name: [name for name in node.inputs if used[name][-1].name == node.name
                                 and name != self.graph.output] for node in self.graph}

    @property
    def backend(self) -> str:
        """"int8", or "float" and why: with which kernels the integer layers are computed."""
        return f"float: {self.unsupported}" if self.unsupported else "int8"

    @property
    def slow_nodes(self) -> list[str]:
        """Operations without a fast form, in order."""
        return [node.name for node in self.graph if node.name not in self.steps and node.op != "input"]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if self.unsupported or x.device.type != "cpu" or x.numel() == 0 or bool(x.isnan().any()):
            return self.exact(x)
        values: dict[str, FastForms] = {}
        for node in self.graph:
            values[node.name] = self._step(node, x, values)
            for name in self.done[node.name]:
                values.pop(name, None)
        return values[self.graph.output][REAL]

    def _step(self, node: Node, x: Tensor, values: dict[str, FastForms]) -> FastForms:
        inputs = [values[name] for name in node.inputs]
        if node.name in self.steps:
            return self.steps[node.name](inputs)
        needed = [self.exact._form(edge) for edge in node.edges()] or [REAL]
        given = {name: {form: to_float(form, forms[form]) for form in needed if form in forms}
                 for name, forms in zip(node.inputs, inputs, strict=True)}
        return _all_bytes(self.exact._step(node, x, given))

    # --- compiling -----------------------------------------------------------------------------------------

    def _compile(self) -> None:
        sums = {layer: node for node in self.graph if node.op == "add" and (layer := self._fused_layer(node))}
        for node in self.graph:
            step = None
            if node.name in self.exact.fused:
                step = _first
            elif node.op in CODE_OPS:
                step = self._code_step(node)
            elif node.op in ("conv", "linear") and node.name in self.layers:
                step = self._defer(node) if node.name in sums else self._layer_step(node)
            elif node.op == "add" and self._fused_layer(node):
                step = self._sum_step(node)
            elif node.op == "avgpool" and self._is_global(node):
                step = self._mean_step(node)
            if step is not None:
                self.steps[node.name] = step

    def _fused_layer(self, node: Node) -> str:
        """The layer whose int8 kernel can do this add as well, or nothing."""
        pending = [edge for edge in node.edges() if edge in self.exact.pending]
        forms = [self.exact._form(edge) for edge in node.edges() if edge not in pending] + self.exact.wanted[node.name]
        layer = self.layers[self.exact.pending[pending[0]]] if len(pending) == 1 else None
        alone = layer is not None and self.exact.wanted[layer.node.name] == [ACCUMULATORS]
        fits = alone and len(forms) == 2 and all(is_narrow(form) for form in forms)
        return layer.node.name if fits and layer.weight.width == 8 and self._taken(layer) else ""

    def _taken(self, layer: IntegerLayer) -> bool:
        plain = layer.window is None or is_elementwise(layer.window, layer.weight.integers.shape[1])
        return plain and onednn.takes(layer.node.module, layer.weight.integers, layer.source.bits)

    def _code_step(self, node: Node) -> Step:
        def step(inputs: list[FastForms]) -> FastForms:
            return {form: on_bytes(node, form, inputs[0][form]) for form in self.exact.wanted[node.name]}
        return step

    def _layer_step(self, node: Node) -> Step | None:
        """One call for each form, with the factors of `Terms.scaled`; of wide weights or codes by accumulators."""
        layer, wanted = self.layers[node.name], self.exact.wanted[node.name]
        if not self._taken(layer):
            return None
        if layer.weight.width > 8 or not all(is_narrow(form) or form == REAL for form in wanted):
            return self._accumulator_step(node)
        kernels = {form: self._kernel(layer, form, layer.shift) for form in wanted}

        def step(inputs: list[FastForms]) -> FastForms:
            codes = _read(layer, inputs[0])
            return {form: kernel(codes, torch.float32) if form == REAL else rounded(kernel, codes, form)
                    for form, kernel in kernels.items()}
        return step

    def _kernel(self, layer: IntegerLayer, form: Form, shift: Tensor) -> Int8Layer:
        """acc * m0 + b in units of `form`."""
        step, zero = (1.0, 0) if form == REAL else (form.scale, form.zero)
        return Int8Layer(layer.node.module, layer.weight.integers, zero_byte(layer.source),
                         (layer.gain / step).float(), (shift / step + zero).float())

    def _accumulator_step(self, node: Node) -> Step | None:
        """The sums from int8 kernels, the rest as `IntegerNetwork` does it."""
        layer = self.layers[node.name]
        digits = digits_of(layer.weight.integers) if layer.weight.width > 8 else [(1, layer.weight.integers)]
        ones, noughts = torch.ones(len(layer.gain)), torch.zeros(len(layer.gain))
        kernels = [(factor, Int8Layer(node.module, plane, zero_byte(layer.source), ones, noughts))
                   for factor, plane in digits]

        def step(inputs: list[FastForms]) -> FastForms:
            codes = _read(layer, inputs[0])
            total = sum(kernel(codes, torch.float32).double() * factor for factor, kernel in kernels)
            return _all_bytes(self.exact._from_terms(node, Terms((total.float(),), (layer.gain,), layer.shift)))
        return step if digits else None

    def _defer(self, node: Node) -> Step:
        """Left to the add that takes the accumulators."""
        layer = self.layers[node.name]
        return lambda inputs: {ACCUMULATORS: Pending(layer, _read(layer, inputs[0]))}

    def _sum_step(self, node: Node) -> Step:
        """The conv and the add: in one call where the product of a code and its factor is exact, else in float32."""
        ours = next(i for i, edge in enumerate(node.edges()) if edge in self.exact.pending)
        layer, target = self.layers[self._fused_layer(node)], self.exact.wanted[node.name][0]
        source = self.exact._form(node.edges()[1 - ours])
        factor = float(short(torch.tensor(source.scale, dtype=torch.float64) / target.scale))
        kernel = self._kernel(layer, target, layer.shift - source.zero * source.scale)
        last, top = self._is_last_reader(node, 1 - ours), top_byte(target)
        unsigned = source.code_range[0] == target.code_range[0] == 0
        fused = unsigned and kernel.geometry is not None and onednn.exact_product(factor)

        def step(inputs: list[FastForms]) -> FastForms:
            codes, other = inputs[ours][ACCUMULATORS].codes, inputs[1 - ours][source]
            if kernel.output_shape(codes) != other.shape:
                return {target: summed_at_once(kernel, codes, other, source, factor, target)}
            if fused:
                y = kernel.add_to(other if last else other.clone(), codes, factor)
                return {target: y.clamp_max_(top) if top < 255 else y}
            return {target: summed(kernel, codes, other, source, factor, target)}
        return step

    def _is_last_reader(self, add: Node, side: int) -> bool:
        """Whether an add may overwrite its input: nobody reads that tensor, under any name, beside or after it."""
        order = {name: i for i, name in enumerate(self.graph.nodes)}
        root = self._root(add.inputs[side])
        names = {name for name in order if self._root(name) == root}
        readers = [node for node in self.graph for name in node.inputs if name in names and node.name not in names]
        late = [node.name for node in readers if order[self._read_at(node)] >= order[add.name]]
        return late == [add.name] and self.graph.output not in names

    def _root(self, name: str) -> str:
        """The node that made the tensor called `name`."""
        node = self.graph.nodes[name]
        return self._root(node.inputs[0]) if node.op in ALIASES or name in self.exact.fused else name

    def _read_at(self, node: Node) -> str:
        """When `node` reads its codes: a conv whose accumulators an add takes, with that add."""
        adds = [edge.rpartition(":")[0] for edge, layer in self.exact.pending.items() if layer == node.name]
        return adds[0] if adds else node.name

    def _is_global(self, node: Node) -> bool:
        pool = node.module
        narrow = node.edges()[0] in self.exact.ranges and is_narrow(self.exact.ranges[node.name])
        return narrow and isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))

    def _mean_step(self, node: Node) -> Step:
        """One sum of all pixels, exact in int32."""
        quantizer = self.exact.ranges[node.name]

        def step(inputs: list[FastForms]) -> FastForms:
            codes = inputs[0][quantizer]
            area = codes.shape[-1] * codes.shape[-2]
            total = codes.sum((-2, -1), keepdim=True, dtype=torch.int32) - area * zero_byte(quantizer)
            gain = torch.tensor(quantizer.scale / area, dtype=torch.float64)
            return _all_bytes(self.exact._from_terms(node, Terms((total.float(),), (gain,), gain.new_zeros(()))))
        return step


def _first(inputs: list[FastForms]) -> FastForms:
    """A batch norm that the layer before it has done."""
    return inputs[0]


def _all_bytes(forms: Forms) -> FastForms:
    return {form: to_bytes(form, value) for form, value in forms.items()}


def _read(layer: IntegerLayer, forms: FastForms) -> Tensor:
    """The bytes that a layer multiplies: after its window, which is taken once for all readers of a value."""
    if layer.window is None:
        return layer.read(forms[layer.source])
    key = (layer.source, layer.window)
    if key not in forms:
        forms[key] = in_memory_order(layer.read(forms[layer.source]))
    return forms[key]
