"""The walk over an integer network that writes an ONNX graph; what a node becomes is said by who inherits."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import nn

from ...core.errors import CompressError, ConfigError, GraphError
from ...core.graph.graph import Node
from ...core.train.loaders import first_line
from ..exact import IntegerNetwork
from . import operations
from .facts import BATCH, Facts, shown
from .writer import IR_VERSIONS, Writer, onnx_library


class Walk(ABC):
    """reals {node: name of its real value}, stored {layer: type of its weight}, shapes {node: without the batch}."""

    def __init__(self, network: IntegerNetwork, writer: Writer):
        self.network, self.graph, self.write = network, network.graph, writer
        self.stored: dict[str, str] = {}
        self.reals: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def emit(self, node: Node) -> str:
        """Write a node; the name of its real value, if it has one."""

    def model(self, shape: tuple[int, ...]):
        """The checked ONNX model."""
        onnx = onnx_library()
        self._check(shape)
        self._shapes(shape)
        for node in self.graph:
            self.reals[node.name] = self.emit(node)
        self.write.nodes.append(onnx.helper.make_node("Identity", [self.reals[self.graph.output]], ["output"]))
        ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *self.shapes[node]])
                for name, node in (("input", next(iter(self.graph.nodes))), ("output", self.graph.output))]
        graph = onnx.helper.make_graph(self.write.nodes, "jointcompress", ends[:1], ends[1:], self.write.constants)
        opset = self.write.opset
        model = onnx.helper.make_model(graph, ir_version=IR_VERSIONS[opset], producer_name="jointcompress",
                                       opset_imports=[onnx.helper.make_opsetid("", opset)])
        onnx.checker.check_model(model)
        return model

    def _check(self, shape: tuple[int, ...]) -> None:
        """ConfigError where `shape` is none, GraphError where an operation has no form."""
        sizes = shape if isinstance(shape, (tuple, list)) else ()
        if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise ConfigError(f"shape = {shape!r}: to_onnx needs that of one input, such as (3, 32, 32)")
        for node in self.graph:
            tokens = isinstance(node.module, nn.Embedding) and self.graph.nodes[node.inputs[0]].op == "input"
            if tokens:
                raise GraphError(f"the input of {node.name} (Embedding) is integers: to_onnx needs a network of one "
                                 "float input")
            if node.op != "input" and node.name != self.graph.output and not operations.has(node):
                raise GraphError(f"{self.graph.why_opaque()}{operations.without_form(node)}")

    @torch.no_grad()
    def _shapes(self, shape: tuple[int, ...]) -> None:
        """{node: shape of its value without the batch}; two batches tell a batch from another dimension."""
        self.shapes[next(iter(self.graph.nodes))] = tuple(shape)
        for batch in (BATCH, BATCH + 1):
            try:
                self.graph.run(torch.zeros(batch, *shape), partial(self._see, batch))
            except CompressError:
                raise
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise ConfigError(f"shape = {tuple(shape)}: {type(self.network.given[1]).__name__} cannot take a batch "
                                  f"of {batch} such float inputs: {first_line(error)}") from error

    def _see(self, batch: int, node: Node, inputs: tuple, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise GraphError(f"{node.name} is a {type(output).__name__.removeprefix('immutable_')}: to_onnx needs a "
                             "network of one tensor as its output")
        here = tuple(output.shape[1:])
        if output.shape[:1] != (batch,) or self.shapes.setdefault(node.name, here) != here:
            raise GraphError(f"{node.name} makes {shown(output.shape)} of {batch} inputs: ONNX export knows values "
                             "whose first dimension is the batch")

    def facts(self, node: Node) -> Facts:
        whole = node.at({name: torch.Size([BATCH, *self.shapes[name]]) for name in node.shaped_by})
        return Facts(tuple(self.shapes[name] for name in node.inputs), self.shapes[node.name], whole.run)

    def with_norm(self, node: Node, y: str) -> str:
        """`y`, what a node made, through the batch norm that a layer in float takes along."""
        norm = self.graph.norm_after(node.name) if node.op in ("conv", "linear") else None
        return y if norm is None else operations.batch_norm(self.write, self.graph.nodes[norm], [y], None)
