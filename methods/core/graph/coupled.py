"""Which output channels of a network's layers go together: one set for each width that several layers share.

Residual additions and depthwise convolutions tie channels of several layers: these go or stay together, and so share
one mask (see `channel_flow.py`, whose classes these are).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .channel_flow import Forward
from .graph import Graph


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose output channels go together.

    size     number of sets of channels that can go
    members  {layer: int64 [C_out]}: the set that each of its output channels belongs to
    """

    size: int
    members: dict[str, Tensor]


def find_groups(graph: Graph) -> list[Group]:
    """Every group of which channels can go, in execution order.

    Left out: layers whose channels are the network's outputs, or are read by an operation that needs them all.

    >>> from torch import nn
    >>> from jointcompress.methods.core.graph.graph import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    >>> [(group.size, list(group.members)) for group in find_groups(trace(net))]
    [(4, ['0']), (2, ['1'])]
    """
    forward = Forward(graph, lambda edge, constants: constants, (), (), {})
    for node in graph:
        forward.values[node.name] = forward.value_of(node)
    roots, stuck = forward.classes.roots(), _stuck(graph, forward)
    stuck = set(roots[sorted(stuck | forward.classes.pinned)].tolist()) if stuck | forward.classes.pinned else set()
    classes = {name: roots[forward.values[name].classes] for name in forward.readings}
    groups: list[dict[str, np.ndarray]] = []
    for name, own in classes.items():
        touching = [group for group in groups if any(np.isin(own, other).any() for other in group.values())]
        groups = [group for group in groups if group not in touching]
        groups.append({layer: c for group in [*touching, {name: own}] for layer, c in group.items()})
    return [_group(group) for group in groups if not stuck & set(np.concatenate(list(group.values())).tolist())]


def _group(classes: dict[str, np.ndarray]) -> Group:
    ids, places = np.unique(np.concatenate(list(classes.values())), return_inverse=True)
    parts = np.split(places, np.cumsum([len(own) for own in classes.values()])[:-1])
    return Group(len(ids), {name: torch.from_numpy(part.astype(np.int64))
                            for name, part in zip(classes, parts, strict=True)})


def _stuck(graph: Graph, forward: Forward) -> set[int]:
    """Classes of which every channel is needed: of the output, and of what an operation that is not known reads."""
    found: set[int] = set()
    for node in graph:
        if node.name == graph.output:
            found |= _classes(forward, node.name)
        for name in (*node.inputs, *(node.shaped_by if node.op != "flatten" else ())):
            reads = forward.values[node.name].classes is not None or node.op == "flatten"
            source = node.name not in forward.readings or forward.readings[node.name].source is not None
            if not (reads and source):
                found |= _classes(forward, name)
    return found


def _classes(forward: Forward, name: str) -> set[int]:
    classes = forward.values[name].classes
    return set() if classes is None else set(classes.tolist())
