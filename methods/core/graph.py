"""A network as a short list of known operations, traced with torch.fx.

Edges are where activations can be quantized: the input of every conv, linear and average pool (edge name =
node name) and both inputs of every add (edge names `add:0`, `add:1`). A module's node is called by its path
(`layer1.0.conv2`), a function's by its fx name (`add_3`).
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .errors import GraphError

MODULES = {
    nn.Conv2d: "conv", nn.Linear: "linear", nn.BatchNorm2d: "bn", nn.BatchNorm1d: "bn", nn.ReLU: "relu",
    nn.MaxPool2d: "maxpool", nn.AvgPool2d: "avgpool", nn.AdaptiveAvgPool2d: "avgpool", nn.Flatten: "flatten",
    nn.Dropout: "identity", nn.Dropout2d: "identity", nn.Identity: "identity",
}
FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", "relu": "relu", F.max_pool2d: "maxpool", F.avg_pool2d: "avgpool",
    F.adaptive_avg_pool2d: "avgpool", torch.flatten: "flatten", "flatten": "flatten", F.dropout: "identity",
    operator.add: "add", operator.iadd: "add", torch.add: "add", "add": "add", "contiguous": "identity",
}
EDGE_OPS = ("conv", "linear", "avgpool", "add")  # what reads quantized activations
CODE_OPS = ("relu", "maxpool", "flatten", "identity")  # monotone or moving: they act on codes as on values


@dataclass(frozen=True)
class Node:
    """One operation. `inputs` are names of earlier nodes; `run(*tensors)` computes it in float."""

    name: str
    op: str
    inputs: tuple[str, ...]
    run: Callable[..., Tensor]
    module: nn.Module | None = None

    def edges(self) -> list[str]:
        """Names of the quantizable edges into this node, one per input."""
        if self.op not in EDGE_OPS:
            return []
        return [self.name] if len(self.inputs) == 1 else [f"{self.name}:{i}" for i in range(len(self.inputs))]


class Graph:
    """The nodes of a network in execution order; the first is the input, `output` names the last value."""

    def __init__(self, nodes: list[Node], output: str):
        self.nodes = {node.name: node for node in nodes}
        self.output = output

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def consumers(self, name: str) -> list[Node]:
        return [node for node in self if name in node.inputs]

    def edges(self) -> list[str]:
        return [edge for node in self for edge in node.edges()]

    def run(self, x: Tensor, see: Callable[[Node, tuple[Tensor, ...], Tensor], None] | None = None) -> Tensor:
        """The float network; `see(node, inputs, output)` is called after each operation."""
        values = {next(iter(self.nodes)): x}
        last_use = {name: node.name for node in self for name in node.inputs}
        for node in self:
            if node.op == "input":
                continue
            inputs = tuple(values[name] for name in node.inputs)
            values[node.name] = node.run(*inputs)
            if see is not None:
                see(node, inputs, values[node.name])
            for name in node.inputs:
                if last_use[name] == node.name and name != self.output:
                    values.pop(name, None)
        return values[self.output]

    def norm_after(self, layer: str) -> str | None:
        """The batch norm that alone consumes `layer`'s output, or None."""
        after = self.consumers(layer)
        return after[0].name if len(after) == 1 and after[0].op == "bn" and layer != self.output else None


def trace(model: nn.Module) -> Graph:
    """The graph of `model` (its modules are shared, not copied).

    Raises GraphError, naming the operator or layer, where the network cannot be traced or holds an operation
    outside MODULES and FUNCTIONS.
    """
    try:
        traced = fx.Tracer().trace(model)
    except Exception as error:  # noqa: BLE001 - fx raises many types; all mean the same to the caller
        raise GraphError(f"torch.fx cannot trace {type(model).__name__}: {str(error).splitlines()[0]}") from error
    named = dict(model.named_modules())
    nodes, output = [], ""
    for node in traced.nodes:
        if node.op == "output":
            output = _name(node.args[0])
        elif node.op == "get_attr":
            raise GraphError(f"the parameter {node.target!r} is used outside a known layer")
        else:
            nodes.append(_convert(node, named))
    if sum(node.op == "input" for node in nodes) != 1:
        raise GraphError("a network takes exactly one input tensor")
    return Graph(nodes, output)


def _name(value) -> str:
    if not isinstance(value, fx.Node):
        raise GraphError(f"a network must return one tensor, not {value!r}")
    return str(value.target) if value.op == "call_module" else value.name


def _convert(node: fx.Node, named: dict[str, nn.Module]) -> Node:
    if node.op == "placeholder":
        return Node(node.name, "input", (), lambda x: x)
    if node.op == "call_module":
        module = named[node.target]
        op = MODULES.get(type(module))
        if op is None:
            raise GraphError(f"layer {node.target!r} is a {type(module).__name__}; known are: "
                             + ", ".join(sorted(kind.__name__ for kind in MODULES)))
        _once(node)
        return Node(node.target, op, (_name(node.args[0]),), module, module)
    op = FUNCTIONS.get(node.target)
    if op is None:
        known = sorted({t if isinstance(t, str) else t.__name__ for t in FUNCTIONS})
        raise GraphError(f"operation {node.name!r} ({node.target}) is not known; known are: {', '.join(known)}")
    inputs = tuple(_name(arg) for arg in node.args if isinstance(arg, fx.Node))
    if op == "add" and (len(node.args) != 2 or len(inputs) != 2):
        raise GraphError(f"operation {node.name!r} adds something that is not an activation")
    rest = tuple(arg for arg in node.args if not isinstance(arg, fx.Node))
    function = node.target if callable(node.target) else getattr(Tensor, node.target)
    if op == "identity":
        function, rest, kwargs = (lambda x: x), (), {}
    else:
        kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return Node(node.name, op, inputs, lambda *xs: function(*xs, *rest, **kwargs))


def _once(node: fx.Node) -> None:
    same = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    if len(same) > 1 and same[0] is not node:
        raise GraphError(f"layer {node.target!r} is called {len(same)} times; every layer must be called once")
