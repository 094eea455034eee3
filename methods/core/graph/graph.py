"""`trace`: the graph of any network."""

from torch import nn

from ..errors import GraphError
from .convert import Converter
from .nodes import Graph, Node
from .operations import SUMS, TABLE
from .tracer import Tracer, reason

EDGE_OPS = tuple(row.name for row in TABLE if row.acts == SUMS)  # what reads quantized activations

__all__ = ["EDGE_OPS", "Graph", "Node", "trace"]


def trace(model: nn.Module) -> Graph:
    """The graph of `model` as it computes in eval mode (its modules are shared, not copied).

    What torch.fx cannot look into is one barrier: a module, or the whole network (`Graph.opaque` says why). Raises
    GraphError where the network does not take exactly one input, or reads a part of what it changed in place.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _traced(model)
    finally:
        for module, training in modes.items():
            module.training = training


def _traced(model: nn.Module) -> Graph:
    tracer = Tracer()
    try:
        recorded = tracer.trace(model)
    except GraphError:
        raise
    except Exception as error:  # noqa: BLE001 - fx raises many types; all mean that it cannot look inside
        nodes = [Node("input", "input", (), lambda x: x), Node("network", "barrier", ("input",), model, model)]
        return Graph(nodes, "network", {"": f"{type(model).__name__}, {reason(error)}"})
    made = Converter(model, recorded)
    if sum(node.op == "input" for node in made.nodes) != 1:
        raise GraphError("a network takes exactly one input tensor")
    return Graph(_alive(made.nodes, made.output), made.output, tracer.opaque)


def _alive(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output comes from, and the input."""
    needed = {output}
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs, node.shaped_by)
    return [node for node in nodes if node.name in needed or node.op == "input"]
