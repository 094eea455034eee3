"""Which channels of a pruned network can change an output, and which can be cut out.

Backward from the output: a channel is live if a kept weight of a live channel reads it, or an operation that is not
known here does. A constant (channel_flow.py) that a conv or linear reads is taken into its bias, so nothing reads it
any more. Channels of one class go together or not at all.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .channel_flow import Forward, Reading, Value, numbers
from .graph import Graph

Masks = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Flow:
    """What is known of each node.

    live        bool [C]: channels that can change an output
    reached     bool [C]: the same if none were constant: what a weight that grows again into them could change
    class_live  bool [classes]
    """

    values: dict[str, Value]
    live: dict[str, np.ndarray]
    reached: dict[str, np.ndarray]
    readings: dict[str, Reading]
    class_live: np.ndarray

    def outputs(self, name: str) -> np.ndarray | None:
        """bool [C]: the channels of a node that have to stay; None where it is not known, so all of them."""
        classes = self.values[name].classes
        return None if classes is None else self.class_live[classes]


def follow(graph: Graph, constant_at: Callable[[str, np.ndarray], np.ndarray] | None = None,
           fixed: Collection[str] = (), grouped: Collection[str] = (), masks: Mapping[str, Tensor] | None = None
           ) -> Flow:
    """The flow of a network whose modules hold the pruned weights.

    constant_at  (edge, constants [C] of the value there) -> the constants that its reader sees; default the same
    fixed        edges whose channels must all stay as they are
    grouped      convs that had groups before they lost all but one
    masks        {layer: bool} of weights to keep of what the modules hold
    """
    forward = Forward(graph, constant_at if constant_at is not None else lambda edge, constants: constants, fixed,
                      grouped, masks if masks is not None else {})
    for node in graph:
        forward.values[node.name] = forward.value_of(node)
    live = _live(graph, forward, fixed, {name: reading.uses for name, reading in forward.readings.items()})
    reached = _live(graph, forward, fixed, {name: reading.kept for name, reading in forward.readings.items()})
    roots = forward.classes.roots()
    class_live = np.zeros(len(roots), bool)
    class_live[[forward.classes.find(one) for one in forward.classes.pinned]] = True
    for name, value in forward.values.items():
        if value.classes is not None:
            class_live[roots[value.classes[live[name]]]] = True
    for value in forward.values.values():  # a layer keeps one channel, though nobody reads it
        if value.classes is not None and len(value.classes) and not class_live[roots[value.classes]].any():
            class_live[roots[value.classes[0]]] = True
    return Flow(forward.values, live, reached, forward.readings, class_live[roots])


def _live(graph: Graph, forward: Forward, fixed: Collection[str], uses: Mapping[str, np.ndarray]
          ) -> dict[str, np.ndarray]:
    """{node: bool [C]}: channels from which an output is reached through `uses` {layer: bool [O, I / groups]}."""
    values = forward.values
    live = {name: np.zeros(0 if v.classes is None else len(v.classes), bool) for name, v in values.items()}
    live[graph.output][:] = True
    for node in reversed(list(graph)):
        start = 0
        for name in node.shaped_by if node.op != "flatten" else ():  # it may count the channels
            live[name][:] = True
        for name in node.inputs:
            if values[name].classes is None:
                continue
            if values[node.name].classes is None or set(node.edges()) & set(fixed):
                live[name][:] = True
            elif node.name in forward.readings:
                live[name] |= _wanted(forward.readings[node.name].source, uses[node.name], live[node.name],
                                      len(live[name]))
            elif node.op == "cat":
                live[name] |= live[node.name][start:start + len(live[name])]
                start += len(live[name])
            elif node.op == "bn":
                norm, wanted = node.module, live[node.name]
                wanted = wanted & (numbers(norm.weight) != 0) if norm.affine else wanted
                live[name] |= wanted.reshape(len(live[name]), -1).any(1)
            else:
                live[name] |= live[node.name]
    return live


def _wanted(source: np.ndarray | None, uses: np.ndarray, outputs: np.ndarray, channels: int) -> np.ndarray:
    """bool [channels] of a layer's input that its live outputs use."""
    if source is None:
        return np.ones(channels, bool)
    groups = len(source) // uses.shape[1]
    read = (uses & outputs[:, None]).reshape(groups, -1, uses.shape[1]).any(1).reshape(-1)
    return np.bincount(source[read], minlength=channels) > 0


def live_positions(graph: Graph, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """{layer: bool, shape of its weight}: where a weight can change an output, be it kept now or pruned.

    masks  {layer: bool, shape of its weight} of kept weights; of layers left out, zeros are pruned
    `masks[layer] & live_positions(graph, masks)[layer]` are the weights worth their bits: of the rest `shrink` makes a
    bias, or nothing.
    """
    return {name: places for name, (places, _) in live_and_constant(graph, masks).items()}


def live_and_constant(graph: Graph, masks: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (its live positions, float64 [C_out]: what the others add to its output, whatever the input is)}."""
    flow, found = follow(graph, masks=masks), {}
    for name, reading in flow.readings.items():
        weight = graph.nodes[name].module.weight
        useful = torch.from_numpy(reading.open & flow.reached[name][:, None])
        places = useful.reshape(*useful.shape, *[1] * (weight.ndim - 2)).expand(weight.shape).clone()
        found[name] = places, torch.from_numpy(reading.moved)
    return found


def give_back(graph: Graph, masks: Mapping[str, Tensor], grow: Callable[[Masks, Masks], Masks]) -> Masks:
    """`masks` {layer: bool} without the weights that can change no output, and with others in their place.

    grow  (kept, free) -> {layer: bool}, what to add: places of `free`, which are pruned and where, beside `kept`, a
          weight could change an output
    A unit that lost one side loses the other, so what may grow is asked once that is gone; what is added there leaves
    nothing idle. A layer that the graph does not follow keeps what it has, and a network that is cut, so that no one
    weight could change an output, its masks.
    """
    kept = {name: mask & places for (name, mask), places in zip(masks.items(), _places(graph, masks), strict=True)}
    if not any(bool(mask.any()) for mask in kept.values()):
        return dict(masks)
    free = {name: places & ~mask for (name, mask), places in zip(masks.items(), _places(graph, kept), strict=True)}
    added = grow(kept, free)
    return {name: mask | added[name] if name in added else mask for name, mask in kept.items()}


def _places(graph: Graph, masks: Mapping[str, Tensor]) -> list[Tensor]:
    live = live_positions(graph, masks)
    return [live[name].to(mask.device) if name in live else torch.ones_like(mask) for name, mask in masks.items()]
