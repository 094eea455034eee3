"""A network as a short list of known operations, traced with torch.fx.

Edges are where activations can be quantized: the input of every conv, linear and average pool (edge name =
node name) and the inputs of every add (edge names `add:0`, `add:1`). A module's node is called by its path
(`layer1.0.conv2`), a function's, and a repeated call's of a module without weights, by its fx name (`add_3`).
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import GraphError

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
MAY_ALIAS = ("flatten", "identity")  # may return the tensor that they were given, or a view of it
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

    def accumulator_edges(self) -> dict[str, str]:
        """{edge of an add: the conv or linear behind it}, at most one per add.

        Where a conv or linear (and its batch norm) feeds nothing but an add, the sum is taken in its
        accumulators, as integer engines do: that edge needs no quantizer of its own.
        """
        found: dict[str, str] = {}
        for node in self:
            for edge, name in zip(node.edges(), node.inputs, strict=False) if node.op == "add" else ():
                layer, alone, norms = self.nodes[name], len(self.consumers(name)) == 1, []
                while layer.op in ("bn", "identity") and alone:
                    norms += [layer.name] if layer.op == "bn" else []
                    layer = self.nodes[layer.inputs[0]]
                    alone = len(self.consumers(layer.name)) == 1
                fused = alone and norms in ([], [self.norm_after(layer.name)])
                if layer.op in ("conv", "linear") and fused and not any(e in found for e in node.edges()):
                    found[edge] = layer.name
        return found

    def norm_after(self, layer: str) -> str | None:
        """The batch norm that alone consumes `layer`'s output, or None."""
        after = self.consumers(layer)
        return after[0].name if len(after) == 1 and after[0].op == "bn" and layer != self.output else None


class _Proxy(fx.Proxy):
    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {}, name="add")


class _Tracer(fx.Tracer):
    """Records x += y as such, where fx would record x + y."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module) -> Graph:
    """The graph of `model` (its modules are shared, not copied).

    Raises GraphError, naming the operator or layer, where the network cannot be traced or holds an operation
    outside MODULES and FUNCTIONS.
    """
    try:
        traced = _Tracer().trace(model)
    except Exception as error:  # noqa: BLE001 - fx raises many types; all mean the same to the caller
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GraphError(f"torch.fx cannot trace {type(model).__name__}: {reason}") from error
    named = dict(model.named_modules())
    names = _node_names(traced, named)
    _refuse_aliases(traced, named, names)
    nodes, output = [], ""
    for node in traced.nodes:
        if node.op == "output":
            output = _one(node.args[0], names)
        elif node.op == "get_attr":
            raise GraphError(f"the parameter {node.target!r} is used outside a known layer")
        else:
            nodes.append(_convert(node, named, names))
    if sum(node.op == "input" for node in nodes) != 1:
        raise GraphError("a network takes exactly one input tensor")
    return Graph(nodes, output)


def _node_names(traced: fx.Graph, named: dict[str, nn.Module]) -> dict[fx.Node, str]:
    """A name of its own for every node, layers first; a layer with weights may be called only once."""
    names: dict[fx.Node, str] = {}
    called: set[str] = set()
    for node in sorted(traced.nodes, key=lambda node: node.op != "call_module"):
        name = node.name
        if node.op == "call_module" and node.target not in called:
            name = str(node.target)
            called.add(name)
        elif node.op == "call_module" and MODULES.get(type(named[node.target])) in ("conv", "linear", "bn"):
            raise GraphError(f"layer {node.target!r} is called more than once: a layer with weights is called once")
        while name in names.values():
            name += "_"
        names[node] = name
    return names


def _refuse_aliases(traced: fx.Graph, named: dict[str, nn.Module], names: dict[fx.Node, str]) -> None:
    """GraphError where a tensor is read after it was changed in place: a graph computes nothing in place."""
    made_by: dict[fx.Node, fx.Node] = {}  # {node so far: the node that made the tensor it returns}
    for node in traced.nodes:
        in_place = _is_in_place(node, named)
        shares = node.all_input_nodes and (in_place or _kind(node, named) in MAY_ALIAS)
        maker = made_by[node.all_input_nodes[0]] if shares else node
        readers = [user for other in made_by if made_by[other] is maker for user in other.users]
        late = [user for user in readers if user not in made_by and user is not node] if in_place else []
        made_by[node] = maker
        if late:
            raise GraphError(f"{names[node]!r} changes a tensor in place that {names[late[0]]!r} reads later: "
                             "compute it out of place (inplace=False, x = x + y)")


def _kind(node: fx.Node, named: dict[str, nn.Module]) -> str | None:
    """The operation of a node, None if it is not known."""
    if node.op == "call_module":
        return MODULES.get(type(named[node.target]))
    return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def _is_in_place(node: fx.Node, named: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(named[node.target], nn.ReLU) and named[node.target].inplace
    if node.target is F.relu:
        return bool(node.kwargs.get("inplace", len(node.args) > 1 and node.args[1]))
    return node.target is operator.iadd


def _one(value, names: dict[fx.Node, str]) -> str:
    if not isinstance(value, fx.Node):
        raise GraphError(f"a network must take and return single tensors, not {value!r}")
    return names[value]


def _convert(node: fx.Node, named: dict[str, nn.Module], names: dict[fx.Node, str]) -> Node:
    name = names[node]
    if node.op == "placeholder":
        return Node(name, "input", (), _same)
    if node.op == "call_module":
        module = named[node.target]
        op = MODULES.get(type(module))
        if op is None:
            raise GraphError(f"layer {node.target!r} is a {type(module).__name__}; known are: "
                             + ", ".join(sorted(kind.__name__ for kind in MODULES)))
        if op == "bn" and module.running_var is None:
            raise GraphError(f"batch norm {node.target!r} has no running statistics")
        if len(node.args) != 1 or node.kwargs:
            raise GraphError(f"layer {node.target!r} must be called with one tensor and nothing else")
        run = F.relu if op == "relu" else module  # never in place: other operations may read the same tensor
        return Node(name, op, (_one(node.args[0], names),), run, module)
    op = FUNCTIONS.get(node.target)
    if op is None:
        known = sorted({t if isinstance(t, str) else t.__name__ for t in FUNCTIONS})
        raise GraphError(f"operation {name!r} ({node.target}) is not known; known are: {', '.join(known)}")
    inputs = tuple(names[arg] for arg in node.args if isinstance(arg, fx.Node))
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        raise GraphError(f"operation {name!r} takes a tensor by keyword: give it by position")
    if op == "add" and (len(node.args) != 2 or len(inputs) != 2 or node.kwargs):
        raise GraphError(f"operation {name!r} adds something that is not an activation, or scales it")
    module = _pool(node, op)
    return Node(name, op, inputs, _function(node, op) if module is None else module, module)


def _same(x: Tensor) -> Tensor:
    return x


def _pool(node: fx.Node, op: str) -> nn.Module | None:
    """An average pool that is called as a function, as the module that knows its windows."""
    if op != "avgpool":
        return None
    kind = nn.AvgPool2d if node.target is F.avg_pool2d else nn.AdaptiveAvgPool2d
    return kind(*node.args[1:], **node.kwargs)


def _function(node: fx.Node, op: str) -> Callable[..., Tensor]:
    """What a function or method node computes from its tensors alone."""
    fixed = {"identity": _same, "relu": F.relu, "add": torch.add}
    if op in fixed:
        return fixed[op]
    function = node.target if callable(node.target) else getattr(Tensor, node.target)
    rest = tuple(arg for arg in node.args if not isinstance(arg, fx.Node))
    return lambda *tensors: function(*tensors, *rest, **node.kwargs)
