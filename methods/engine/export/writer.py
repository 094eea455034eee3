"""An ONNX graph under construction: nodes and constants with names of their own, grids of values and weights."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...core.artifact import ActivationQuantizer
from ...core.errors import ConfigError

OPSETS = (13, 21)  # the first has grids per channel, the second 4- and 16-bit integers
IR_VERSIONS = {13: 7, 21: 10}
BIAS_LIMIT = 2.0**31 - 1


def onnx_library():
    """The package `onnx`; ConfigError where it is not installed."""
    try:
        import onnx
    except ImportError:
        raise ConfigError("writing ONNX needs the package onnx: pip install 'jointcompress[export]'") from None
    return onnx


@dataclass
class Writer:
    """Nodes, constants and what was told about them; every method returns the name of a tensor."""

    opset: int
    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    known: dict = field(default_factory=dict)  # {key: name} of what is written once

    def add(self, op: str, *inputs: str, **attributes) -> str:
        """One operation with one output."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(onnx_library().helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: np.ndarray, kind: int | None = None) -> str:
        """A constant; `kind` is ONNX's data type where NumPy has none (INT4)."""
        onnx, name = onnx_library(), f"constant_{len(self.constants)}"
        if kind is None:
            self.constants.append(onnx.numpy_helper.from_array(np.asarray(values, order="C"), name))
        else:
            self.constants.append(onnx.helper.make_tensor(name, kind, values.shape, values.reshape(-1)))
        return name

    def real(self, values: Tensor) -> str:
        return self.constant(values.detach().cpu().float().numpy())

    def through_codes(self, value: str, quantizer: ActivationQuantizer) -> str:
        """`value` rounded to the codes of `quantizer` and decoded again; codes are stored as code - lowest code."""
        key = (value, quantizer)
        if key not in self.known:
            low, high = quantizer.code_range
            if quantizer.bits > 8 and self.opset < 21:
                raise ConfigError(f"activations of {quantizer.bits} bits need opset 21; given is {self.opset}")
            kind = np.uint8 if quantizer.bits <= 8 else np.uint16
            grid = self._grid(np.float32(quantizer.scale), kind(quantizer.zero - low))
            short, ends = high - low < np.iinfo(kind).max, np.asarray([0, high - low])
            if short and kind == np.uint16:  # engines clip bytes, but not pairs of them
                value = self._clip(value, ((ends + low - quantizer.zero) * quantizer.scale).astype(np.float32))
            codes = self.add("QuantizeLinear", value, *grid)
            if short and kind == np.uint8:
                codes = self._clip(codes, ends.astype(kind))
            self.known[key] = self.add("DequantizeLinear", codes, *grid)
        return self.known[key]

    def _clip(self, value: str, ends: np.ndarray) -> str:
        return self.add("Clip", value, *(self.constant(end) for end in ends))

    def _grid(self, scale: np.generic, zero: np.generic) -> tuple[str, str]:
        key = ("grid", float(scale), int(zero), zero.dtype)
        if key not in self.known:
            self.known[key] = self.constant(np.asarray(scale)), self.constant(np.asarray(zero))
        return self.known[key]

    def weight(self, integers: Tensor, scale: Tensor, axis: int, int4: bool) -> tuple[str, str]:
        """scale [C] * integers (int32, C along `axis`), stored in the narrowest type; and the name of that type.

        The zero point is one for the whole tensor (engines take no other beside several scales), and 0 where it can be.
        """
        onnx, scales = onnx_library(), self.real(scale)
        low, high = (min(int(integers.min()), 0), max(int(integers.max()), 0)) if integers.numel() else (0, 0)
        for name, kind, bits in (("int4", onnx.TensorProto.INT4, 4), ("int8", None, 8))[0 if int4 else 1:]:
            least, most = -(1 << bits - 1), (1 << bits - 1) - 1
            if high - low > most - least:
                continue
            zero = 0 if least <= low and high <= most else least - low
            values, zeros = (integers + zero).cpu().numpy().astype(np.int8), np.full(len(scale), zero, np.int8)
            return self.add("DequantizeLinear", self.constant(values, kind), scales, self.constant(zeros, kind),
                            axis=axis), name
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        return self.real(integers.double() * scale.double().reshape(shape)), "float32"

    def whole(self, integers: Tensor) -> tuple[str, str]:
        """Integers as real numbers, stored in the narrowest type; and the name of that type."""
        kind = next(kind for kind in (np.int8, np.int16, np.int32) if not integers.numel() or (
            np.iinfo(kind).min <= int(integers.min()) and int(integers.max()) <= np.iinfo(kind).max))
        return self.add("Cast", self.constant(integers.cpu().numpy().astype(kind)),
                        to=onnx_library().TensorProto.FLOAT), np.dtype(kind).name

    def bias(self, shift: Tensor, unit: Tensor) -> str:
        """`shift` [C] as int32 in units [C] of an accumulator, decoded."""
        zero = self.constant(np.zeros(len(unit), np.int32))
        values = torch.round(shift.double() / unit.double()).to(torch.int32).cpu().numpy()
        return self.add("DequantizeLinear", self.constant(values), self.real(unit), zero, axis=0)
