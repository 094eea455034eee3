"""A network as a short list of operations, each of which makes one value from earlier ones.

Edges are where activations can be quantized: the input of every conv, linear and average pool (edge name =
node name) and the inputs of every add (edge names `add:0`, `add:1`). A module's node is called by its path
(`layer1.0.conv2`), a function's, and a repeated call's, by its fx name (`add_3`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .operations import CLAMPS, JOINS, MOVES, OPERATIONS, SAME, SUMS, Operation


@dataclass(frozen=True)
class Node:
    """One operation. `inputs` are names of earlier nodes; `run(*tensors)` computes it in float.

    op         a name of `operations.TABLE`
    module     the module that is called, or the one that a function stands for; None where there is none
    bounds     (low, high) of a clamp, -inf or inf where there is no bound
    shaped_by  earlier nodes whose shapes, not values, it needs: `run` takes tensors of those shapes after the inputs
               (on the meta device will do); see `at`
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    run: Callable[..., Any]
    module: nn.Module | None = None
    bounds: tuple[float, float] | None = None
    shaped_by: tuple[str, ...] = ()

    @property
    def kind(self) -> Operation:
        return OPERATIONS[self.op]

    @property
    def on_codes(self) -> bool:
        """Whether it acts on codes as on values, so that nothing is rounded."""
        return self.kind.acts in (CLAMPS, MOVES, JOINS, SAME)

    def edges(self) -> list[str]:
        """Names of the quantizable edges into this node, one per input."""
        if self.kind.acts != SUMS:
            return []
        return [self.name] if len(self.inputs) == 1 else [f"{self.name}:{i}" for i in range(len(self.inputs))]

    def at(self, shapes: Mapping[str, torch.Size]) -> "Node":
        """This node with the shapes that it needs filled in."""
        if not self.shaped_by:
            return self
        stand_ins = [torch.empty(shapes[name], device="meta") for name in self.shaped_by]
        return replace(self, run=partial(_with_shapes, self.run, stand_ins), shaped_by=())


def _with_shapes(run: Callable, stand_ins: list[Tensor], *inputs: Tensor) -> Any:
    return run(*inputs, *stand_ins)


class Graph:
    """The nodes of a network in execution order; the first is the input, `output` names the last value.

    opaque  {path of a module, "" for the network: why torch.fx cannot look inside}; such a module is one barrier
    """

    def __init__(self, nodes: list[Node], output: str, opaque: Mapping[str, str] | None = None):
        self.nodes = {node.name: node for node in nodes}
        self.output = output
        self.opaque = {} if opaque is None else dict(opaque)
        self._readers: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers[name].append(node)
        self._shapes_of = {name for node in nodes for name in node.shaped_by}

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def consumers(self, name: str) -> list[Node]:
        return self._readers[name]

    def edges(self) -> list[str]:
        return [edge for node in self for edge in node.edges()]

    def layers(self) -> list[Node]:
        """The convs and linears that integer kernels know, in execution order."""
        return [node for node in self if node.op in ("conv", "linear")]

    def run(self, x: Tensor, see: Callable[[Node, tuple[Tensor, ...], Tensor], None] | None = None) -> Any:
        """The float network; `see(node, inputs, output)` is called after each operation."""
        values = {next(iter(self.nodes)): x}
        shapes = {name: x.shape for name in values}
        for node in self:
            if node.op == "input":
                continue
            inputs = tuple(values[name] for name in node.inputs)
            values[node.name] = node.at(shapes).run(*inputs)
            if node.name in self._shapes_of:
                shapes[node.name] = values[node.name].shape
            if see is not None:
                see(node, inputs, values[node.name])
            for name in dict.fromkeys(node.inputs):
                if self._readers[name][-1] is node and name != self.output:
                    values.pop(name, None)
        return values[self.output]

    def needs_shape(self, name: str) -> bool:
        """Whether an operation asks for the shape of this value."""
        return name in self._shapes_of

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
        """The batch norm that alone consumes `layer`'s output, or None; of a linear layer on positions [N, T, C] it
        may normalise the positions, which are no channels of the layer."""
        after = self.consumers(layer)
        if len(after) != 1 or after[0].op != "bn" or layer == self.output:
            return None
        made, norm = self.nodes[layer].module, after[0].module
        channels = not isinstance(made, nn.Linear) or (
            isinstance(norm, nn.BatchNorm1d) and norm.num_features == made.out_features)
        return after[0].name if channels else None

    def nonnegative(self) -> set[str]:
        """The values that are never below 0, whatever the input."""
        found: set[str] = set()
        for node in self:
            low = -1.0 if node.bounds is None else node.bounds[0]
            passed = node.on_codes or node.op in ("avgpool", "add")
            if node.kind.positive or low >= 0 or passed and node.inputs and all(name in found for name in node.inputs):
                found.add(node.name)
        return found

    def why_opaque(self) -> str:
        """What torch.fx could not look into, in words that lead an error message on; "" where there is nothing."""
        if not self.opaque:
            return ""
        parts = [f"{path or 'the network'}: {reason}" for path, reason in self.opaque.items()]
        link = "so" if "" in self.opaque else "apart from that,"
        return f"torch.fx cannot look into {'; '.join(parts[:3])}{' …' if len(parts) > 3 else ''}; {link} "
