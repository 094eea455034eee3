"""The integer network on the int8 instructions of the CPU: bit for bit what `IntegerNetwork` computes, only faster.

Codes of up to 8 bits travel as bytes, code - lowest code, in channels_last memory. A conv or linear with its batch
norm, and the add that takes its accumulators, is one call of oneDNN (`onednn.py`). What has no fast form (layers run
in float, wider codes, uncommon pools) takes the step of `IntegerNetwork`, on codes in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.artifact import ActivationQuantizer, CompressedModel
from ..core.fit.windows import is_elementwise
from ..core.graph.graph import Graph, Node
from ..core.graph.operations import CLAMPS
from . import onednn
from .bytecodes import (
    Kernel,
    Part,
    Sum,
    in_memory_order,
    is_narrow,
    on_bytes,
    rounded,
    summed_in_forms,
    to_bytes,
    to_float,
    zero_byte,
)
from .exact import ACCUMULATORS, REAL, Form, Forms, IntegerLayer, IntegerNetwork, Terms, shape_of, short
from .wide import find_kernel
from .windowed import spread_codes, spread_weights


@dataclass(frozen=True)
class Pending:
    """Accumulators that an add will take: the conv has read its codes, but not yet multiplied."""

    layer: IntegerLayer
    codes: Tensor  # uint8, after a window


PRODUCTS = 1000  # of a sum: from about there on, another sum costs more than float32 operations on this one
FastForms = dict[Form | tuple, Tensor | Terms | Pending]
Step = Callable[[list[FastForms]], FastForms]


class FastNetwork:
    """Called like `IntegerNetwork`, on CPU tensors; elsewhere, and where `backend` is "float", it is one.

    exact     the IntegerNetwork that defines every number
    steps     {node: its fast form}; what is missing there is done by `exact`
    kernels   the int8 kernels of the layers
    Layers run in float get the same inputs in the same memory format, and so give the same numbers.
    """

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, float_policy: tuple[str, ...] = (), *,
                 built: tuple[nn.Module, Graph] | None = None):
        self.exact = IntegerNetwork(compressed, skeleton, float_policy, built=built)
        self.graph: Graph = self.exact.graph
        self.layers, self.float_nodes = self.exact.layers, self.exact.float_nodes
        self.unsupported = onednn.unsupported()
        self.steps: dict[str, Step] = {}
        self.kernels: list[tuple[str, Kernel]] = []  # (layer, one for each form that is wanted)
        self.read: dict[str, Callable[[FastForms], Tensor]] = {}  # {layer with an int8 kernel: the bytes it multiplies}
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
        if self.unsupported or x.device.type != "cpu" or x.numel() == 0 or bool(x.sum().isnan()):
            return self.exact(x)
        values: dict[str, FastForms] = {}
        shapes: dict[str, torch.Size] = {}
        for node in self.graph:
            values[node.name] = self._step(node.at(shapes), x, values)
            if self.graph.needs_shape(node.name):
                shapes[node.name] = shape_of(values[node.name])
            for name in self.done[node.name]:
                values.pop(name, None)
        return values[self.graph.output][REAL]

    def _step(self, node: Node, x: Tensor, values: dict[str, FastForms]) -> FastForms:
        inputs = [values[name] for name in node.inputs]
        if node.name in self.steps:
            return self.steps[node.name](inputs)
        needed = [self.exact._form(edge) for edge in node.edges()] or [REAL]
        needed = self.exact.wanted[node.name] if node.on_codes else needed
        given = {name: {form: to_float(form, forms[form]) for form in needed if form in forms}
                 for name, forms in zip(node.inputs, inputs, strict=True)}
        return _all_bytes(self.exact._step(node, x, given))

    # --- compiling -----------------------------------------------------------------------------------------

    def _compile(self) -> None:
        self.read = {name: read for name, layer in self.layers.items() if (read := _reader(layer)) is not None}
        sums = {layer: node for node in self.graph if node.op == "add" and (layer := self._fused_layer(node))}
        for node in self.graph:
            step = None
            if node.name in self.exact.fused:
                step = _first
            elif node.on_codes and not node.shaped_by:
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
        others = [self.exact._form(edge) for edge in node.edges() if edge not in pending]
        layer = self.layers[self.exact.pending[pending[0]]] if len(pending) == 1 else None
        alone = layer is not None and self.exact.wanted[layer.node.name] == [ACCUMULATORS] \
            and not self.graph.needs_shape(layer.node.name)
        fits = alone and len(others) == 1 and is_narrow(others[0]) \
            and all(is_narrow(form) or form == REAL for form in self.exact.wanted[node.name])
        return layer.node.name if fits and layer.node.name in self.read else ""

    def _code_step(self, node: Node) -> Step:
        def step(inputs: list[FastForms]) -> FastForms:
            return {form: on_bytes(node, form, *(forms[form] for forms in inputs))
                    for form in self.exact.wanted[node.name]}
        return step

    def _layer_step(self, node: Node) -> Step | None:
        """One call for each form, with the factors of `Terms.scaled`; of wide codes by accumulators."""
        layer, wanted = self.layers[node.name], self.exact.wanted[node.name]
        if node.name not in self.read:
            return None
        if not all(is_narrow(form) or form == REAL for form in wanted):
            return self._accumulator_step(node)
        kernels = {form: self._kernel(layer, form, layer.shift) for form in wanted}
        read = self.read[node.name]

        def step(inputs: list[FastForms]) -> FastForms:
            codes = read(inputs[0])
            return {form: kernel(codes, torch.float32) if form == REAL else rounded(kernel, codes, form)
                    for form, kernel in kernels.items()}
        return step

    def _kernel(self, layer: IntegerLayer, form: Form, shift: Tensor) -> Kernel:
        """acc * m0 + b in units of `form`."""
        step, zero = (1.0, 0) if form == REAL else (form.scale, form.zero)
        return self._of(layer, (layer.gain / step).float(), (shift / step + zero).float())

    def _sums_of(self, layer: IntegerLayer) -> Kernel:
        """f32(acc)."""
        return self._of(layer, torch.ones(len(layer.gain)), torch.zeros(len(layer.gain)))

    def _of(self, layer: IntegerLayer, factor: Tensor, offset: Tensor) -> Kernel:
        integers = _multiplied(layer)
        kind = find_kernel(layer.node.module, integers, layer.source.bits)
        self.kernels.append((layer.node.name, kind(layer.node.module, integers, zero_byte(layer.source), factor,
                                                   offset)))
        return self.kernels[-1][1]

    def _accumulator_step(self, node: Node) -> Step:
        """The sums from an int8 kernel, the rest as `IntegerNetwork` does it."""
        layer, read, kernel = self.layers[node.name], self.read[node.name], self._sums_of(self.layers[node.name])

        def step(inputs: list[FastForms]) -> FastForms:
            total = kernel(read(inputs[0]), torch.float32)
            return _all_bytes(self.exact._from_terms(node, Terms((total,), (layer.gain,), layer.shift,
                                                                   node.op == "linear")))
        return step

    def _defer(self, node: Node) -> Step:
        """Left to the add that takes the accumulators."""
        layer, read = self.layers[node.name], self.read[node.name]
        return lambda inputs: {ACCUMULATORS: Pending(layer, read(inputs[0]))}

    def _sum_step(self, node: Node) -> Step:
        """The conv and the add, once for each form: in one call where the codes' product is exact, else in float32.

        A sum of many products that is read in several forms is taken once, and scaled in float32 for each.
        """
        ours = next(i for i, edge in enumerate(node.edges()) if edge in self.exact.pending)
        layer, source = self.layers[self._fused_layer(node)], self.exact._form(node.edges()[1 - ours])
        forms, last = self.exact.wanted[node.name], self._is_last_reader(node, 1 - ours)
        several = len(forms) > 1 and REAL not in forms and layer.weight.integers[0].numel() >= PRODUCTS
        kernel = self._sums_of(layer) if several else None
        parts = [self._part(layer, source, form) for form in forms] if several else []

        @functools.cache
        def sums() -> list[Sum]:  # the last one may overwrite what it adds
            return sorted((self._sum(layer, source, form) for form in forms), key=lambda one: one.in_place)
        if not several:
            sums()

        def step(inputs: list[FastForms]) -> FastForms:
            codes, other = inputs[ours][ACCUMULATORS].codes, inputs[1 - ours][source]
            if kernel is not None and kernel.output_shape(codes) == other.shape:
                return summed_in_forms(kernel, codes, other, source, parts)
            return {one.form: one(codes, other, last and one is sums()[-1]) for one in sums()}
        return step

    def _sum(self, layer: IntegerLayer, source: ActivationQuantizer, form: Form) -> Sum:
        kernel = self._kernel(layer, form, layer.shift - source.zero * source.scale)
        unsigned = form != REAL and source.code_range[0] == form.code_range[0] == 0
        factor = _added(source, form)
        return Sum(kernel, source, factor, form, unsigned and kernel.adds_codes and onednn.exact_product(factor))

    def _part(self, layer: IntegerLayer, source: ActivationQuantizer, form: ActivationQuantizer) -> Part:
        shape = (1, -1, *[1] * (layer.weight.integers.ndim - 2))
        shift = layer.shift - source.zero * source.scale
        return Part(form, (layer.gain / form.scale).float().reshape(shape),
                    (shift / form.scale + form.zero).float().reshape(shape), _added(source, form))

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
        aliases = node.kind.aliases or node.kind.acts == CLAMPS or name in self.exact.fused
        return self._root(node.inputs[0]) if aliases else name

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


def _added(source: ActivationQuantizer, form: Form) -> float:
    """The factor of an added code."""
    return float(short(torch.tensor(source.scale, dtype=torch.float64) / (1.0 if form == REAL else form.scale)))


def _first(inputs: list[FastForms]) -> FastForms:
    """A batch norm that the layer before it has done."""
    return inputs[0]


def _all_bytes(forms: Forms) -> FastForms:
    return {form: to_bytes(form, value) for form, value in forms.items()}


def _reader(layer: IntegerLayer) -> Callable[[FastForms], Tensor] | None:
    """The bytes that a layer multiplies, from its input: after its window, which is taken once for all readers of a
    value. None where no int8 kernel has the layer."""
    window, integers = layer.window, layer.weight.integers
    dense = window is None or is_elementwise(window, integers.shape[1])
    if not dense and (integers.shape[1] % 4 or not window.sparse24) \
            or find_kernel(layer.node.module, _multiplied(layer), layer.source.bits) is None:
        return None
    if window is None and layer.node.op == "linear":
        return lambda forms: layer.read(forms[layer.source]).contiguous()
    if window is None:
        return lambda forms: layer.read(forms[layer.source])
    alone = not dense and spread_weights(integers)[1]
    key = (layer.source, window, alone)

    def read(forms: FastForms) -> Tensor:
        if key not in forms:
            codes = layer.read(forms[layer.source])
            forms[key] = in_memory_order(codes if dense else spread_codes(codes, window, alone))
        return forms[key]
    return read


def _multiplied(layer: IntegerLayer) -> Tensor:
    """The integers that multiply what `_reader` reads."""
    window, integers = layer.window, layer.weight.integers
    return integers if window is None or is_elementwise(window, integers.shape[1]) else spread_weights(integers)[0]
