"""Residual blocks that can be left out: what goes in comes out, plus something of its shape."""

from collections import Counter

from torch import nn

from ..errors import GraphError
from .graph import trace
from .nodes import Node
from .operations import of_module
from .weights import weight_layers


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the residual blocks whose shortcut is the identity, in definition order; of nested ones the inner.

    Runs no layer. Left out: a block of which the network holds a layer under a second name.

    >>> class Block(nn.Sequential):
    ...     def forward(self, x):
    ...         return x + super().forward(x)
    >>> find_blocks(nn.Sequential(nn.Linear(3, 4), Block(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)))
    ['1']
    """
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    found = [path for path, module in model.named_modules() if path and is_block(module) and not any(
        names[inner] > 1 and inner.state_dict() for inner in module.modules())]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def is_block(module: nn.Module) -> bool:
    """Whether a module has weights, and its input reaches its output by additions and what clamps at 0 or does nothing.

    Then the identity can take its place: the block without what it adds, but for clamps, which a value that was
    clamped before does not feel.
    """
    if of_module(module) is not None or not weight_layers(module):
        return False
    try:
        graph = trace(module)
    except GraphError:  # several inputs
        return False
    reached = {next(iter(graph.nodes)): False}  # {value: whether something was added}
    for node in graph:
        before = [reached[name] for name in node.inputs if name in reached]
        if before and _lets_through(node):
            reached[node.name] = node.op == "add" or any(before)
    return reached.get(graph.output, False)


def _lets_through(node: Node) -> bool:
    return node.op in ("add", "identity") or node.bounds is not None and node.bounds[0] == 0
