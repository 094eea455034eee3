"""The integer network by its definition: int64 sums, numpy float32 arithmetic, one value at a time. Slow.

It shares nothing with `IntegerNetwork` but the traced graph: wiring, integers, gains and shifts are those of
`definition`. What computes with real values is called here as there, on the real values found here.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..core.artifact import ActivationQuantizer
from ..core.graph.graph import Node
from .accumulate import accumulate_int64
from .definition import Definition
from .exact import IntegerNetwork
from .reference_windows import average_windows, windowed_sums

FACTOR_BITS = 16  # significant bits of the factor of an added code


class ReferenceRun:
    """`codes(name, quantizer)` and `real(name)` of every value of an integer network on one batch."""

    def __init__(self, network: IntegerNetwork, x: Tensor):
        self.network = Definition(*network.given)
        self.nodes, self.x = self.network.nodes, x
        self.known: dict[tuple[str, ActivationQuantizer | None], np.ndarray] = {}

    def codes(self, name: str, quantizer: ActivationQuantizer) -> np.ndarray:
        """int64 codes of a value under a quantizer."""
        key = (name, quantizer)
        if key not in self.known:
            self.known[key] = self._codes(self.nodes[name], quantizer)
        return self.known[key]

    def real(self, name: str) -> np.ndarray:
        """float32 numbers of a value (whatever an operation of its own kind returns, where that is no tensor)."""
        key = (name, None)
        if key not in self.known:
            self.known[key] = self._real(self.nodes[name])
        return self.known[key]

    def _passes(self, node: Node) -> bool:
        return node.op == "identity" or node.name in self.network.norms

    def _codes(self, node: Node, quantizer: ActivationQuantizer) -> np.ndarray:
        if self._passes(node):
            return self.codes(node.inputs[0], quantizer)
        if node.bounds is not None:
            low, high = (int(_encoded(np.float32(end), quantizer)) for end in node.bounds)
            return np.clip(self.codes(node.inputs[0], quantizer), low, high)
        if node.op == "flatten":
            inner = self.codes(node.inputs[0], quantizer)
            return inner.reshape(len(inner), -1)
        if node.on_codes:  # moves values: told apart by their distance from 0, which is what a pad fills in
            inner = [torch.from_numpy(self.codes(name, quantizer) - quantizer.zero).double() for name in node.inputs]
            return self._call(node, inner).numpy().astype(np.int64) + quantizer.zero
        if self._is_real(node):
            return _encoded(self.real(node.name), quantizer)
        return _rounded(self._scaled(node, quantizer.scale, quantizer.zero), quantizer)

    def _real(self, node: Node) -> np.ndarray:
        if node.op == "input":
            return self.x.numpy()
        if self._passes(node):
            return self.real(node.inputs[0])
        if node.on_codes:
            return _array(self._call(node, [_tensor(self.real(name)) for name in node.inputs]))
        return self._float(node) if self._is_real(node) else self._scaled(node, 1.0, 0)

    def _is_real(self, node: Node) -> bool:
        """Whether a node computes with real values; so does an average pool whose windows are not alike."""
        if node.op == "input" or node.name in self.network.in_float:
            return True
        return node.op == "avgpool" and self._windows(node) is None

    def _float(self, node: Node) -> np.ndarray:
        """An operation on real values, which are decoded where its edge has codes."""
        values = []
        for edge, name in zip(node.edges() or [None] * len(node.inputs), node.inputs, strict=True):
            quantizer = self.network.ranges.get(edge)
            values.append(_tensor(self.real(name) if quantizer is None else _decoded(
                self.codes(name, quantizer), quantizer)))
        y = self._call(node, values)
        norm = self.network.norm_of(node.name)
        return _array(y if norm is None else self.nodes[norm].run(y))

    @torch.no_grad()
    def _call(self, node: Node, values: list):
        shapes = {name: torch.Size(self.real(name).shape) for name in node.shaped_by}
        return node.at(shapes).run(*values)

    def _windows(self, node: Node) -> tuple[np.ndarray, int] | None:
        """int64 sums over the windows of an average pool and how many values are in each; None if that differs."""
        quantizer = self.network.ranges[node.name]
        codes = self.codes(node.inputs[0], quantizer) - quantizer.zero
        if node.module is not None:
            return average_windows(node.module, codes)
        mean = node.run(torch.from_numpy(codes).double()).numpy()
        count = codes.size // mean.size
        return np.rint(mean * count).astype(np.int64), count

    def _scaled(self, node: Node, step: float, zero: int) -> np.ndarray:
        """(t0 * m0 + b) + t1 * m1, every operation in float32, m1 on FACTOR_BITS bits."""
        terms, shift, axis = self._terms(node)
        y = None
        for total, gain in terms:
            factor = gain / step if y is None else _short(gain / step)
            product = total.astype(np.float32) * _along(np.float32(factor), total.ndim, axis)
            y = product + _along(np.float32(shift / step + zero), total.ndim, axis) if y is None else y + product
        return y

    def _terms(self, node: Node) -> tuple[list, np.ndarray | float, int]:
        """[(int64 sums or codes, float64 gain)], accumulators first, the float64 shift of all of them, and the
        dimension of the channels."""
        if node.op in ("conv", "linear"):
            layer = self.network.layers[node.name]
            return [(self._sums(node), layer.gain)], layer.shift, -1 if node.op == "linear" else 1
        if node.op == "avgpool":
            totals, count = self._windows(node)
            return [(totals, self.network.ranges[node.name].scale / count)], 0.0, 1
        terms, shift, axis = [], 0.0, 1
        for edge, name in sorted(zip(node.edges(), node.inputs, strict=True), key=lambda side: not self._pending(side)):
            if self._pending((edge, name)):
                terms, shift, axis = self._terms(self.nodes[self.network.pending[edge]])
            else:
                quantizer = self.network.ranges[edge]
                terms.append((self.codes(name, quantizer), quantizer.scale))
                shift = shift - quantizer.zero * quantizer.scale
        return terms, shift, axis

    def _pending(self, side: tuple[str, str]) -> bool:
        return side[0] in self.network.pending

    def _sums(self, node: Node) -> np.ndarray:
        layer = self.network.layers[node.name]
        codes = self.codes(node.inputs[0], layer.source)
        if layer.window is not None:
            return windowed_sums(node.module, codes, layer.integers, layer.window)
        integers = torch.from_numpy(layer.integers)
        return accumulate_int64(node.module, torch.from_numpy(codes - layer.source.zero), integers).numpy()


def _encoded(y: np.ndarray, quantizer: ActivationQuantizer) -> np.ndarray:
    return _rounded(np.rint(y / np.float32(quantizer.scale)) + np.float32(quantizer.zero), quantizer)


def _rounded(y: np.ndarray, quantizer: ActivationQuantizer) -> np.ndarray:
    return np.clip(np.rint(y), *quantizer.code_range).astype(np.int64)


def _decoded(codes: np.ndarray, quantizer: ActivationQuantizer) -> np.ndarray:
    return (codes - quantizer.zero).astype(np.float32) * np.float32(quantizer.scale)


def _along(values: np.ndarray | np.float32, ndim: int, axis: int) -> np.ndarray | np.float32:
    """One value per channel shaped to multiply an array; a single value as it is."""
    if np.ndim(values) == 0 or axis == -1:
        return values
    return values.reshape(1, -1, *[1] * (ndim - 2))


def _tensor(value):
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _array(value):
    return value.detach().numpy() if isinstance(value, Tensor) else value


def _short(factor: float) -> float:
    """The nearest number of FACTOR_BITS significant bits."""
    unit = 2.0 ** (math.frexp(factor)[1] - FACTOR_BITS)
    return round(factor / unit) * unit
