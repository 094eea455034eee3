"""A compressed model run in integer arithmetic.

Activations are integer codes, weights are integers, accumulators are exact. Where a value is produced (by a
conv, linear, add, average pool, or at the input) it is requantized once for every quantizer that reads it:

    code = clamp(round_half_even(float32(accumulator) * m + b) + zero)         float32 arithmetic
    m = scale_in * scale_w * gamma / sqrt(var + eps) / scale_out,   b = folded bias / scale_out   (rounded once)

so a batch norm that follows a conv or linear costs nothing. ReLU, max pool and flatten act on codes. A layer
without codes (excluded by the method, or by the caller's policy) runs in float and is listed in `float_layers`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.artifact import ActivationQuantizer, CompressedModel
from methods.core.build import apply
from methods.core.errors import GraphError
from methods.core.graph import CODE_OPS, Graph, Node, trace

from .accumulate import accumulate, exact_dtype
from .weights import IntegerWeight, integer_weight

Forms = dict[ActivationQuantizer | None, Tensor]  # a value's codes per quantizer; None: the real value


@dataclass(frozen=True)
class IntegerLayer:
    """A conv or linear with its integers and its real-valued epilogue y = acc * gain + shift (per channel)."""

    node: Node
    weight: IntegerWeight
    source: ActivationQuantizer
    gain: Tensor  # float64 [C_out], without the input scale
    shift: Tensor  # float64 [C_out]
    dtype: torch.dtype

    def accumulate(self, codes: Tensor) -> Tensor:
        return accumulate(self.node.module, codes - self.source.zero, self.weight.integers, self.dtype)


class IntegerNetwork:
    """Callable on a batch of real inputs; returns real outputs.

    compressed    with an activation quantizer at every edge that an integer layer reads
    skeleton      the float network it was made from
    float_policy  names of layers to run in float although they have codes (a paper's policy)
    """

    def __init__(self, compressed: CompressedModel, skeleton: nn.Module, float_policy: tuple[str, ...] = ()):
        self.module = apply(compressed, skeleton)
        self.graph: Graph = trace(self.module)
        self.ranges = compressed.activations
        unknown = sorted(set(float_policy) - set(compressed.weights))
        if unknown:
            raise GraphError(f"no layers {unknown} to run in float; there are: {', '.join(compressed.weights)}")
        self.fused = {norm: node.name for node in self.graph if node.op in ("conv", "linear")
                      if (norm := self.graph.norm_after(node.name)) is not None}
        self.layers = {node.name: self._layer(node, compressed) for node in self.graph
                       if node.name in compressed.weights and node.name not in float_policy}
        self.float_layers = [node.name for node in self.graph
                             if node.op in ("conv", "linear") and node.name not in self.layers]
        self.wanted = {node.name: self._wanted(node.name) for node in self.graph}
        self.see: Callable[[IntegerLayer, Tensor, Tensor], None] | None = None  # (layer, codes in, accumulators)

    def _layer(self, node: Node, compressed: CompressedModel) -> IntegerLayer:
        source = self.ranges.get(node.name)
        if source is None:
            raise GraphError(f"the input of {node.name} has no activation quantizer: calibrate the model first")
        weight = integer_weight(compressed.weights[node.name])
        low, high = (code - source.zero for code in source.code_range)
        ratio, shift = self._epilogue(node)
        return IntegerLayer(node, weight, source, weight.scale * ratio, shift, exact_dtype(weight.integers, low, high))

    def _epilogue(self, node: Node) -> tuple[Tensor, Tensor]:
        """float64 [C_out] ratio and shift of bias and batch norm: y = z * ratio + shift."""
        layer, norm_name = node.module, self.graph.norm_after(node.name)
        channels = layer.weight.shape[0]
        bias = torch.zeros(channels, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
        if norm_name is None:
            return torch.ones_like(bias), bias
        norm = self.graph.nodes[norm_name].module
        ratio = (norm.running_var.double() + norm.eps).rsqrt()
        ratio = ratio * norm.weight.detach().double() if norm.affine else ratio
        shift = (bias - norm.running_mean.double()) * ratio
        return ratio, shift + norm.bias.detach().double() if norm.affine else shift

    def _wanted(self, name: str) -> list[ActivationQuantizer | None]:
        """The forms in which the value `name` is read, in order of first use."""
        found = [None] if name == self.graph.output else []
        for node in self.graph.consumers(name):
            if node.op in CODE_OPS or node.name in self.fused:
                found += self._wanted(node.name)
            else:
                found += [self.ranges.get(edge) for edge, source in zip(node.edges(), node.inputs, strict=False)
                          if source == name] or [None]
        return list(dict.fromkeys(found))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        values: dict[str, Forms] = {}
        for node in self.graph:
            values[node.name] = self._step(node, x, values)
            for name in node.inputs:  # free what nobody reads any more
                if name != self.graph.output and self.graph.consumers(name)[-1].name == node.name:
                    values.pop(name, None)
        return values[self.graph.output][None]

    def _step(self, node: Node, x: Tensor, values: dict[str, Forms]) -> Forms:
        if node.op == "input":
            return self._requantize(node, lambda q: (x, None, None))
        inputs = [values[name] for name in node.inputs]
        if node.name in self.fused:
            return inputs[0]
        if node.op in CODE_OPS:
            return {q: _on_codes(node, q, value) for q, value in inputs[0].items()}
        if node.name in self.layers:
            layer = self.layers[node.name]
            codes = inputs[0][layer.source]
            total = layer.accumulate(codes)
            if self.see is not None:
                self.see(layer, codes, total)
            total = total.float()
            return self._requantize(node, lambda q: (total, layer.gain * layer.source.scale, layer.shift))
        if node.op == "avgpool" and self.ranges.get(node.name) is not None:
            return self._average(node, inputs[0])
        if node.op == "add" and all(self.ranges.get(edge) is not None for edge in node.edges()):
            return self._add(node, inputs)
        real = [self._real(edge, forms) for edge, forms in zip(node.edges() or [node.name], inputs, strict=False)]
        y = node.run(*real)
        if node.name in self.float_layers and self.graph.norm_after(node.name) is not None:
            y = self.graph.nodes[self.graph.norm_after(node.name)].run(y)
        return self._requantize(node, lambda q: (y, None, None))

    def _real(self, edge: str, forms: Forms) -> Tensor:
        """The real value a float operation reads at `edge`: decoded where the edge is quantized."""
        quantizer = self.ranges.get(edge)
        return forms[None] if quantizer is None else quantizer.decode(forms[quantizer])

    def _requantize(self, node: Node, parts) -> Forms:
        """Every wanted form of y = total * gain + shift (per channel; gain None: y = total)."""
        forms: Forms = {}
        for quantizer in self.wanted[node.name]:
            total, gain, shift = parts(quantizer)
            step = 1.0 if quantizer is None else quantizer.scale
            if gain is None:
                y = total if quantizer is None else total / step
            else:
                shape = (1, -1, *[1] * (total.ndim - 2))
                m, b = ((part / step).float().to(total.device).reshape(shape) for part in (gain, shift))
                y = total * m + b
            forms[quantizer] = y if quantizer is None else _to_codes(y, quantizer)
        return forms

    def _average(self, node: Node, forms: Forms) -> Forms:
        """Average pool on codes: exact integer sums, then one multiplication."""
        quantizer = self.ranges[node.name]
        codes = (forms[quantizer] - quantizer.zero).double()
        mean = node.run(codes)
        area = _window(node, codes.shape, mean.shape)
        total = torch.round(mean * area)
        if bool(((mean * area - total).abs() > 1e-3).any()):
            raise GraphError(f"the windows of the average pool {node.name} differ in size: no integer sums")
        total = total.float()
        return {q: (total * _f32(quantizer.scale / area)) if q is None else
                _to_codes(total * _f32(quantizer.scale / area / q.scale), q) for q in self.wanted[node.name]}

    def _add(self, node: Node, inputs: list[Forms]) -> Forms:
        """a + b of codes on their own scales: round_half_even(a * (s_a / s) + b * (s_b / s))."""
        sides = [self.ranges[edge] for edge in node.edges()]
        a, b = (forms[q] - q.zero for forms, q in zip(inputs, sides, strict=True))
        forms: Forms = {}
        for q in self.wanted[node.name]:
            step = 1.0 if q is None else q.scale
            y = a * _f32(sides[0].scale / step) + b * _f32(sides[1].scale / step)
            forms[q] = y if q is None else _to_codes(y, q)
        return forms


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _window(node: Node, before: torch.Size, after: torch.Size) -> int:
    """Inputs of one window of an average pool."""
    pool = node.module
    if isinstance(pool, nn.AvgPool2d):
        sides = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
        return pool.divisor_override if pool.divisor_override is not None else sides[0] * sides[1]
    return (before[-1] * before[-2]) // (after[-1] * after[-2])


def _to_codes(y: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """`y`, in steps of the quantizer, to codes held as float32."""
    return torch.round(y).add_(quantizer.zero).clamp_(*quantizer.code_range)


def _on_codes(node: Node, quantizer: ActivationQuantizer | None, value: Tensor) -> Tensor:
    """A monotone or moving operation; on codes a ReLU's 0 is the zero point."""
    if quantizer is not None and node.op == "relu":
        return value.clamp_min(float(quantizer.zero))
    return node.run(value)
