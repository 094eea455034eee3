"""From what torch.fx recorded to the nodes of a graph.

What makes a tensor from tensors becomes a node. What only makes numbers (sizes and sums of them), constants
(parameters used directly, and what follows from them) or tuples of which items are taken becomes part of the nodes
that use it: each computes these itself, from its inputs and the shapes of other values.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import GraphError
from . import recognise
from .nodes import Node
from .operations import COPIES, SIZE_ATTRIBUTES, SIZE_METHODS, changes_its_input

Value = Any


@dataclass
class Part:
    """How a node is computed: calls `steps` of fx (the last is its own), from `inputs` and the shapes of `shapes`."""

    inputs: list[fx.Node] = field(default_factory=list)
    shapes: list[fx.Node] = field(default_factory=list)
    steps: list[fx.Node] = field(default_factory=list)


class Converter:
    """Of one traced network. `nodes` in execution order; `output` is the name of the last value."""

    def __init__(self, model: nn.Module, traced: fx.Graph):
        self.modules = dict(model.named_modules())
        self.traced = traced
        self.calls = _count_calls(traced, self.modules)
        self.names: dict[fx.Node, str] = {}  # of the values that are nodes; changes with writing in place
        self.stale: dict[fx.Node, str] = {}  # {a view of a tensor that was written to: by which node}
        self.maker: dict[fx.Node, tuple[fx.Node, bool]] = {}  # (who made the memory, whether it is all of it)
        self.taken: set[str] = set()
        self.reserved = {str(node.target) for node in traced.nodes if node.op == "call_module"}
        self.nodes: list[Node] = []
        self.output = ""
        for node in traced.nodes:
            self._take(node)

    def _take(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._add(node, Node(self._name(node), "input", (), _same))
        elif node.op == "output":
            self.output = self._packed(node)
        elif not self._is_deferred(node):
            self._add(node, self._node(node))

    def _add(self, node: fx.Node, made: Node) -> None:
        self.nodes.append(made)
        self.names[node] = made.name
        writes = changes_its_input(*self._call(node)) if node.op.startswith("call") else False
        first = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.names), None)
        aliases = made.kind.aliases and not (node.op != "call_module" and node.target in COPIES)
        if first is None or not (writes or aliases):
            self.maker[node] = node, True
            return
        root, whole = self.maker[first]
        self.maker[node] = root, whole and (writes or made.op == "identity")
        for other, (made_by, all_of_it) in list(self.maker.items()) if writes else ():
            if made_by is root and other is not node and all_of_it and whole:
                self.names[other] = made.name  # who reads it later reads what was written
            elif made_by is root and other is not node:
                self.stale[other] = made.name

    def _call(self, node: fx.Node) -> tuple:
        target = self.modules[node.target] if node.op == "call_module" else node.target
        return target, node.args, node.kwargs

    # --- what is a node ------------------------------------------------------------------------------------

    def _is_deferred(self, node: fx.Node) -> bool:
        """Whether `node` makes no tensor of the graph: a number, a constant, or a tuple of which items are taken."""
        if node.op == "get_attr" or _reads_size(node) or not any(map(self._depends, node.all_input_nodes)):
            return True
        if not node.users or not all(_takes_item(user) for user in node.users):
            return False
        inside = _takes_item(node) and node.args[0] not in self.names
        return inside or recognise.may_return_tuple(self._call(node)[0])

    def _depends(self, node: fx.Node) -> bool:
        """Whether a value depends on the values, not only on the shape, of the network's input."""
        if node in self.names:
            return True
        return not _reads_size(node) and any(map(self._depends, node.all_input_nodes))

    def _part(self, node: fx.Node) -> Part:
        part = Part()

        def visit(one: fx.Node, shape_only: bool = False) -> None:
            if one in self.names and one is not node:
                if one in self.stale and not shape_only:
                    raise GraphError(f"{self.names.get(node, node.name)!r} reads a part of a tensor that "
                                     f"{self.stale[one]!r} has changed in place: compute it out of place")
                (part.shapes if shape_only else part.inputs).append(one)
            elif one not in part.steps:
                for argument in one.all_input_nodes:
                    visit(argument, _reads_size(one))
                part.steps.append(one)

        visit(node)
        part.inputs = list(dict.fromkeys(part.inputs))
        part.shapes = [one for one in dict.fromkeys(part.shapes) if one not in part.inputs]
        return part

    def _node(self, node: fx.Node) -> Node:
        part, call = self._part(node), node
        while _takes_item(call) and call.args[0] in part.steps:
            call = call.args[0]
        module = self.modules[call.target] if call.op == "call_module" else None
        made = Node(self._name(call), "barrier", tuple(self.names[one] for one in part.inputs),
                    _program(part, self.modules), module, shaped_by=tuple(self.names[one] for one in part.shapes))
        shared = module is not None and self.calls[module] > 1  # a layer that is called twice has no one input
        operands = [self.names[one] for one in _tensors(node) if one in self.names]
        held = shared and any(True for _ in itertools.chain(module.parameters(), module.buffers()))
        return made if held else recognise.refined(
            made, recognise.Call(*self._call(call), operands, whole=call is node, plain=len(part.steps) == 1))  # type: ignore[call-arg]

    def _packed(self, node: fx.Node) -> str:
        """The name of the output; several tensors are packed by a node of their own."""
        value = node.args[0]
        if isinstance(value, fx.Node) and value in self.names:
            self._part_check(value)
            return self.names[value]
        part = self._part(node)
        name = self._free("output")
        self.nodes.append(Node(name, "barrier", tuple(self.names[one] for one in part.inputs),
                               _program(part, self.modules),
                               shaped_by=tuple(self.names[one] for one in part.shapes)))
        return name

    def _part_check(self, value: fx.Node) -> None:
        if value in self.stale:
            raise GraphError(f"the output is a part of a tensor that {self.stale[value]!r} has changed in place")

    # --- names ---------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node) -> str:
        """The path of a module at its first call, else fx's name."""
        if node.op == "call_module" and str(node.target) not in self.taken:
            self.taken.add(str(node.target))
            return str(node.target)
        return self._free(node.name)

    def _free(self, name: str) -> str:
        while name in self.taken or name in self.reserved:
            name += "_"
        self.taken.add(name)
        return name


def _count_calls(traced: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[nn.Module, int]:
    calls: dict[nn.Module, int] = {}
    for node in traced.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    return calls


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among a call's arguments, in order, repeated ones too."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return iter(found)


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SIZE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZE_ATTRIBUTES


def _takes_item(node: fx.Node) -> bool:
    return node.op == "call_function" and recognise.is_item(node.target, node.args)


def _same(x: Tensor) -> Tensor:
    return x


def _program(part: Part, modules: Mapping[str, nn.Module]) -> Callable[..., Value]:
    """run(*inputs, *tensors of the shapes) of a part."""
    keys = [*part.inputs, *part.shapes]
    calls = [(step, _call_of(step, modules)) for step in part.steps]

    def run(*values: Tensor) -> Value:
        known = dict(zip(keys, values, strict=True))
        for step, call in calls:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), known.__getitem__)
            known[step] = call(*args, **kwargs)
        return known[calls[-1][0]]
    return run


def _call_of(step: fx.Node, modules: Mapping[str, nn.Module]) -> Callable[..., Value]:
    if step.op == "output":
        return _same
    if step.op == "get_attr":
        owner, _, name = str(step.target).rpartition(".")
        module = modules[owner]
        return lambda: getattr(module, name)
    if step.op == "call_method":
        anyhow = step.target == "view" and not any(isinstance(arg, torch.dtype) for arg in step.args)
        name = "reshape" if anyhow else step.target  # of values in any memory format

        def call(x, *args, **kwargs):
            return getattr(x, name)(*args, **kwargs)
    else:
        call = modules[step.target] if step.op == "call_module" else step.target
    if changes_its_input(call if step.op != "call_method" else step.target, step.args, step.kwargs):
        return lambda x, *args, **kwargs: call(x.clone(), *args, **kwargs)  # a graph computes nothing in place
    return call
