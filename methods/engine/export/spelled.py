"""An integer network as an ONNX graph that spells its arithmetic out: every code is the one that it has here.

Engines requantize in orders of their own, so that now and then a code differs by one; in a deep network one such code
moves others, layer after layer, until outputs differ by as much as rounding does at all. Here codes and sums are
float32 tensors that hold integers, exact up to 2^24, and each multiplication and addition of `exact` is an operation of
its own. Weights are stored as integers. Engines run it at the speed of float: it is a reference, not a fast form.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...core.artifact import ActivationQuantizer
from ...core.errors import GraphError
from ...core.graph.graph import Node
from ..exact import ACCUMULATORS, REAL, Form, Terms, code_bounds, short
from ..pooling import has_even_windows, window_size
from . import operations
from .walk import Walk

LARGEST_SUM = 1 << 20  # of an average pool: the mean of its codes times their number is then nearest to their sum
Named = dict[Form, str | Terms]  # what `exact` calls forms, with names of ONNX tensors in place of tensors


class Spelled(Walk):
    """`formed` {node: its value in the forms in which it is read}; the steps are those of `IntegerNetwork._step`."""

    def __init__(self, *given):
        super().__init__(*given)
        self.formed: dict[str, Named] = {}

    def emit(self, node: Node) -> str:
        network, inputs = self.network, [self.formed[name] for name in node.inputs]
        if node.name in network.fused:
            forms = inputs[0]
        elif node.op == "input":
            forms = self._from_real(node, "input")
        elif node.on_codes:
            forms = {form: self._on_codes(node, form, [one[form] for one in inputs])
                     for form in network.wanted[node.name]}
        elif node.name in network.float_nodes or not self._is_even(node):
            forms = self._from_real(node, self._float(node, inputs))
        elif node.op == "add":
            forms = self._from_terms(node, network._added(node, inputs))
        else:
            forms = self._from_terms(node, (self._averaged if node.op == "avgpool" else self._summed)(node, inputs[0]))
        self.formed[node.name] = forms
        return forms.get(REAL, "")

    def _is_even(self, node: Node) -> bool:
        return node.op != "avgpool" or has_even_windows(node.module, torch.Size(self.shapes[node.inputs[0]]))

    def _on_codes(self, node: Node, form: Form, inputs: list) -> str | Terms:
        if node.op == "identity":
            return inputs[0]
        if form != REAL and node.bounds is not None:
            return self._clip(inputs[0], code_bounds(node.bounds, form))
        zero = 0.0 if form == REAL else float(form.zero)
        return operations.find(node)(self.write, node, inputs, replace(self.facts(node), zero=zero))

    def _float(self, node: Node, inputs: list[Named]) -> str:
        edges = node.edges() or [None] * len(inputs)
        forms = [REAL if edge is None else self.network._form(edge) for edge in edges]
        real = [one[form] if form == REAL else self._decoded(one[form], form)
                for one, form in zip(inputs, forms, strict=True)]
        return self.with_norm(node, operations.find(node)(self.write, node, real, self.facts(node)))

    def _summed(self, node: Node, forms: Named) -> Terms:
        layer = self.network.layers[node.name]
        if layer.dtype != torch.float32:
            raise GraphError(f"layer {node.name}: its sums can pass 2^24, which float32 does not count; "
                             "arithmetic = 'qdq' has a form for it")
        integers = layer.weight.integers.T if node.op == "linear" else layer.weight.integers
        weight, self.stored[node.name] = self.write.whole(integers)
        total = operations.multiply(self.write, node, self._centred(forms[layer.source], layer.source), weight, None,
                                    self.facts(node))
        return Terms((self.write.add("Round", total),), (layer.gain,), layer.shift, node.op == "linear")  # see below

    def _averaged(self, node: Node, forms: Named) -> Terms:
        quantizer = self.network.ranges[node.name]
        before, after = (torch.Size([1, *self.shapes[name]]) for name in (node.inputs[0], node.name))
        area = window_size(node.module, before, after)
        if area << quantizer.bits > LARGEST_SUM:
            raise GraphError(f"{node.name} averages {area} codes: float32 does not count their sum for certain")
        mean = operations.find(node)(self.write, node, [self._centred(forms[quantizer], quantizer)], self.facts(node))
        total = self.write.add("Round", self._times(mean, torch.tensor(float(area))))
        gain = torch.tensor(quantizer.scale / area, dtype=torch.float64)
        return Terms((total,), (gain,), torch.zeros((), dtype=torch.float64))

    def _from_real(self, node: Node, y: str) -> Named:
        return {form: y if form == REAL else self._encoded(y, form) for form in self.network.wanted[node.name]}

    def _from_terms(self, node: Node, terms: Terms) -> Named:
        found: Named = {}
        for form in self.network.wanted[node.name]:
            if form == ACCUMULATORS:
                found[form] = terms
            elif form == REAL:
                found[form] = self._scaled(node, terms, 1.0, 0)
            else:
                found[form] = self._clip(self.write.add("Round", self._scaled(node, terms, form.scale, form.zero)),
                                         form.code_range)
        return found

    def _scaled(self, node: Node, terms: Terms, step: float, zero: int) -> str:
        """(t0 * m0 + b) + t1 * m1. The Round of whole numbers behind a layer keeps an engine from putting m0 into its
        weights, as optimizers do with a product that follows at once."""
        shape = (-1,) if terms.last else (1, -1, *[1] * (len(self.shapes[node.name]) - 1))
        y = self._plus(self._times(terms.tensors[0], terms.gains[0] / step, shape), terms.shift / step + zero, shape)
        if len(terms.tensors) == 1:
            return y
        return self.write.add("Add", y, self._times(terms.tensors[1], short(terms.gains[1] / step), shape))

    def _encoded(self, y: str, form: ActivationQuantizer) -> str:
        codes = self.write.add("Round", self.write.add("Div", y, self.write.real(torch.tensor(form.scale))))
        return self._clip(self._plus(codes, torch.tensor(float(form.zero))), form.code_range)

    def _decoded(self, codes: str, form: ActivationQuantizer) -> str:
        return self._times(self._centred(codes, form), torch.tensor(form.scale))

    def _centred(self, codes: str, form: ActivationQuantizer) -> str:
        return codes if form.zero == 0 else self._plus(codes, torch.tensor(-float(form.zero)))

    def _times(self, y: str, factor: Tensor, shape: tuple[int, ...] = ()) -> str:
        return self.write.add("Mul", y, self.write.real(factor.reshape(shape) if factor.ndim else factor))

    def _plus(self, y: str, shift: Tensor, shape: tuple[int, ...] = ()) -> str:
        return self.write.add("Add", y, self.write.real(shift.reshape(shape) if shift.ndim else shift))

    def _clip(self, codes: str, ends: tuple[int, int]) -> str:
        return self.write.add("Clip", codes, *(self.write.constant(np.asarray(end, np.float32)) for end in ends))
