"""The walk over an integer network that writes an ONNX graph; what a node becomes is said by who inherits."""

from abc import ABC, abstractmethod

import torch

from ...core.errors import GraphError
from ...core.graph.graph import Node
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

    @torch.no_grad()
    def _shapes(self, shape: tuple[int, ...]) -> None:
        """{node: shape of its value without the batch}; two batches tell a batch from another dimension."""
        def see(node, inputs, output):
            if len(output) != batch or self.shapes.setdefault(node.name, tuple(output.shape[1:])) != output.shape[1:]:
                raise GraphError(f"{node.name} makes {shown(output.shape)} of {batch} inputs: ONNX export knows values "
                                 "whose first dimension is the batch")
        self.shapes[next(iter(self.graph.nodes))] = tuple(shape)
        for batch in (BATCH, BATCH + 1):
            self.graph.run(torch.zeros(batch, *shape), see)

    def facts(self, node: Node) -> Facts:
        whole = node.at({name: torch.Size([BATCH, *self.shapes[name]]) for name in node.shaped_by})
        return Facts(tuple(self.shapes[name] for name in node.inputs), self.shapes[node.name], whole.run)

    def with_norm(self, node: Node, y: str) -> str:
        """`y`, what a node made, through the batch norm that a layer in float takes along."""
        norm = self.graph.norm_after(node.name) if node.op in ("conv", "linear") else None
        return y if norm is None else operations.batch_norm(self.write, self.graph.nodes[norm], [y], None)
