"""The integer network by its definition: int64 sums, numpy float32 arithmetic, one value at a time. Slow.

It shares with `IntegerNetwork` the graph, the integers and the real factors of every layer, and no arithmetic.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..core.artifact import ActivationQuantizer
from ..core.errors import GraphError
from ..core.graph.graph import Node
from .accumulate import accumulate_int64
from .exact import FACTOR_BITS, IntegerLayer, IntegerNetwork
from .reference_windows import windowed_sums


class ReferenceRun:
    """`codes(name, quantizer)` and `real(name)` of every value of an integer network on one batch.

    Without layers that run in float; GraphError at an average pool that pads, or adapts to more than one pixel.
    """

    def __init__(self, network: IntegerNetwork, x: Tensor):
        self.network, self.nodes, self.x = network, network.graph.nodes, x
        self.known: dict[tuple[str, ActivationQuantizer], np.ndarray] = {}

    def codes(self, name: str, quantizer: ActivationQuantizer) -> np.ndarray:
        """int64 codes of a value under a quantizer."""
        key = (name, quantizer)
        if key not in self.known:
            self.known[key] = self._codes(self.nodes[name], quantizer)
        return self.known[key]

    def real(self, name: str) -> np.ndarray:
        """float32 numbers of a value that a layer, an add or a pool makes."""
        node = self.nodes[name]
        return self.real(node.inputs[0]) if self._passes(node) else self._scaled(node, 1.0, 0)

    def _passes(self, node: Node) -> bool:
        return node.op == "identity" or node.name in self.network.fused

    def _codes(self, node: Node, quantizer: ActivationQuantizer) -> np.ndarray:
        low, high = quantizer.code_range
        if self._passes(node):
            return self.codes(node.inputs[0], quantizer)
        if node.op == "relu":
            return np.maximum(self.codes(node.inputs[0], quantizer), quantizer.zero)
        if node.op == "flatten":
            inner = self.codes(node.inputs[0], quantizer)
            return inner.reshape(len(inner), -1)
        if node.op == "maxpool":
            inner = torch.from_numpy(self.codes(node.inputs[0], quantizer))
            return node.run(inner.double()).long().numpy()
        if node.op == "input":
            y = np.rint(self.x.numpy() / np.float32(quantizer.scale)) + np.float32(quantizer.zero)
        else:
            y = np.rint(self._scaled(node, quantizer.scale, quantizer.zero))
        return np.clip(y, low, high).astype(np.int64)

    def _scaled(self, node: Node, step: float, zero: int) -> np.ndarray:
        """(t0 * m0 + b) + t1 * m1, every operation in float32, m1 on FACTOR_BITS bits."""
        terms, shift = self._terms(node)
        y = None
        for total, gain in terms:
            shape = (1, -1, *[1] * (total.ndim - 2))
            factor = gain / step if y is None else _short(gain / step)
            product = total.astype(np.float32) * np.float32(factor).reshape(shape if np.ndim(factor) else ())
            y = product + np.float32(shift / step + zero).reshape(shape if np.ndim(shift) else ()) if y is None \
                else y + product
        return y

    def _terms(self, node: Node) -> tuple[list, np.ndarray | float]:
        """[(int64 sums or codes, float64 gain)], accumulators first, and the float64 shift of all of them."""
        if node.op in ("conv", "linear"):
            layer = self.network.layers[node.name]
            return [(self._sums(layer), layer.gain.numpy())], layer.shift.numpy()
        if node.op == "avgpool":
            quantizer = self.network.ranges[node.name]
            totals, area = _window_sums(node, self.codes(node.inputs[0], quantizer) - quantizer.zero)
            return [(totals, quantizer.scale / area)], 0.0
        terms, shift = [], 0.0
        for edge, name in sorted(zip(node.edges(), node.inputs, strict=True), key=lambda side: not self._pending(side)):
            if self._pending((edge, name)):
                terms, shift = self._terms(self.nodes[self.network.pending[edge]])
            else:
                quantizer = self.network.ranges[edge]
                terms.append((self.codes(name, quantizer), quantizer.scale))
                shift = shift - quantizer.zero * quantizer.scale
        return terms, shift

    def _pending(self, side: tuple[str, str]) -> bool:
        return side[0] in self.network.pending

    def _sums(self, layer: IntegerLayer) -> np.ndarray:
        codes, module = self.codes(layer.node.inputs[0], layer.source), layer.node.module
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise GraphError(f"{layer.node.name} does not pad with zeros")
        if layer.window is not None:
            return windowed_sums(module, codes, layer.weight.integers.long().numpy(), layer.window)
        return accumulate_int64(module, torch.from_numpy(codes - layer.source.zero), layer.weight.integers).numpy()


def _window_sums(node: Node, codes: np.ndarray) -> tuple[np.ndarray, int]:
    """int64 sums over the windows of an average pool, and how many codes are in each."""
    pool = node.module
    if isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1)):
        return codes.sum((2, 3), keepdims=True), codes.shape[2] * codes.shape[3]
    if not isinstance(pool, nn.AvgPool2d) or pool.ceil_mode or pool.divisor_override or pool.padding not in (0, (0, 0)):
        raise GraphError(f"the int64 reference does not know the average pool {node.name}: compare with 0 reference "
                         "inputs (--reference 0)")
    (height, width), (down, right) = (value if isinstance(value, tuple) else (value, value)
                                      for value in (pool.kernel_size, pool.stride))
    windows = np.lib.stride_tricks.sliding_window_view(codes, (height, width), (2, 3))[:, :, ::down, ::right]
    return windows.sum((4, 5)), height * width


def _short(factor: float) -> float:
    """The nearest number of FACTOR_BITS significant bits."""
    unit = 2.0 ** (math.frexp(factor)[1] - FACTOR_BITS)
    return round(factor / unit) * unit
