"""Iterative sensitivity: bit widths lowered one by one, where held-out data suffer least for the operations saved.

The post-training baseline that Bayesian Bits (van Baalen et al., NeurIPS 2020) is compared with, refined.

Algorithm
    fold batch norm; all weights at 16 bits, the inputs of all layers too (the network's input: 8)
    until  B <= bops_percent:
        for every tensor that has a narrower width (16, 8, 4, 2): e' = held-out error with it alone lowered
        lower the one of least  (e' - e) / (B - B');  of equal ones that which saves most

Symbols    B = 100 sum_l macs_l b_w b_a / sum_l macs_l 32^2;  e = error;  b_w, b_a = bits of a layer's weight and input

Departures  The authors' code measures every tensor once, from 16 bits to 8 and to 4, sorts by loss and lowers in that
            order: order = "once". Here each layer has a quantizer of its own for its input. Grids are symmetric per
            channel for weights, of the observed range for activations; inputs of additions and pools keep 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .core.artifact import CompressedModel
from .core.budget import Budget
from .core.errors import BudgetError, ConfigError, GraphError
from .core.fit.calibrate import calibrate, check_calibration
from .core.fit.quantize import fit_symmetric, quantize
from .core.fit.size import Knob
from .core.graph.build import assemble, own_copy, weight_layers
from .core.graph.fold import fold_batchnorm
from .core.graph.graph import Graph, Node, trace
from .core.method import check_call
from .core.train.loaders import check_inputs
from .core.train.run import NullRun, Run
from .core.train.task import First, Task
from .core.typed import check_types

DATA = "held_out"
SIZE_KNOB = Knob("config.bops_percent", 0.4, 25.0, step=0.02)
WIDTHS = (16, 8, 4, 2)
INPUT_BITS = 8
ORDERS = ("each step", "once")

Tensors = dict[tuple[str, str], int]  # {("weight" or "input", layer): bits}


@dataclass(frozen=True)
class Config:
    """bops_percent: limit of the bit operations, of 32-bit ones; order: "each step" or "once" (see Departures).

    held_out  examples that errors are measured on, the first ones (0: all)
    """

    bops_percent: float = 1.0
    order: str = "each step"
    held_out: int = 0
    calibration_inputs: int = 1024
    range_method: str = "minmax"

    def __post_init__(self):
        check_types(self)
        check_calibration(INPUT_BITS, self.calibration_inputs, self.range_method)
        if self.order not in ORDERS:
            raise ConfigError(f"order = {self.order!r}: allowed are {', '.join(ORDERS)}")
        if not self.bops_percent > 0 or self.held_out < 0:
            raise ConfigError(f"bops_percent = {self.bops_percent}, held_out = {self.held_out}: allowed are a number "
                              "above 0 and one of 0 or more")


def compress(model: nn.Module, task: Task, budget: Budget, config: Config, generator: torch.Generator,
             *, run: Run | None = None) -> CompressedModel:
    """Budget: none; the limit is config.bops_percent. BudgetError where 2 bits everywhere are above it."""
    check_call(__name__, model, task, budget, config, generator)
    run = NullRun() if run is None else run
    budget.require("iterative_sensitivity")
    model = own_copy(model)
    Budget(bits=WIDTHS[0]).per_layer("bits", weight_layers(model))  # refuses a network without layers
    folded, topology = fold_batchnorm(model)
    if config.held_out > 0:
        task = replace(task, held_out=First(task.held_out, examples=config.held_out))
    check_inputs(folded, task.calibration_inputs(1))
    network = Rounded(folded, task.calibration_inputs(config.calibration_inputs), config.range_method)
    bits = network.start()
    narrowest = 4 if config.order == "once" else WIDTHS[-1]
    least = network.bops({tensor: max(network.least(tensor), narrowest) for tensor in bits})
    if least > config.bops_percent:
        ends = "order = 'once' ends at 4 bits everywhere," if config.order == "once" else "the narrowest widths take"
        raise BudgetError(f"bops_percent = {config.bops_percent:g}: {ends} {least:.3g}")
    task.placed(network)
    steps = Steps(network, task, run)
    rules: dict[str, Callable] = {"each step": steps.each, "once": steps.once}
    bits, course = rules[config.order](bits, config.bops_percent)
    network.set(bits)
    weights = {name: network.codes(name, bits["weight", name]) for name in network.exact}
    folded.cpu()
    return assemble(folded, weights, topology=topology, notes={"course": course}, activations={
        edge: ranges[bits.get(("input", edge), INPUT_BITS)] for edge, ranges in network.ranges.items()})


class Rounded(nn.Module):
    """A folded network whose weights and activations are rounded to the widths of `set`."""

    def __init__(self, folded: nn.Module, inputs: Tensor, method: str):
        super().__init__()
        self.inner, graph = folded.eval(), trace(folded)
        found = {b: calibrate(folded, inputs, b, method) for b in WIDTHS}
        self.ranges = {edge: {b: found[b][edge] for b in WIDTHS} for edge in found[INPUT_BITS]}
        self.exact = {name: layer.weight.detach().cpu().clone() for name, layer in weight_layers(folded).items()}
        self.first = {node.name for node in graph.layers() if _reads_input(graph, node)}
        self.macs = _macs(graph, inputs[:1])
        if not self.macs:
            raise GraphError(f"{graph.why_opaque()}iterative_sensitivity finds no conv and no linear layer whose "
                             "operations it could count")
        self.bits: Tensors = {}
        self.graph = Graph([replace(node, run=self._rounding(node)) for node in graph], graph.output)

    def _rounding(self, node: Node) -> Callable[..., Any]:
        edges = node.edges()

        def run(*values: Tensor) -> Any:
            read = [self._round(edge, value) for edge, value in zip(edges, values, strict=False)]
            return node.run(*read, *values[len(read):])

        return run if edges else node.run

    def _round(self, edge: str, value: Tensor) -> Tensor:
        if edge not in self.ranges:
            return value
        quantizer = self.ranges[edge][self.bits.get(("input", edge), INPUT_BITS)]
        return quantizer.decode(quantizer.encode(value))

    def forward(self, x: Tensor) -> Any:
        return self.graph.run(x)

    def start(self) -> Tensors:
        """16 bits; 8 of the network's input."""
        weights: Tensors = {("weight", name): WIDTHS[0] for name in self.exact}
        inputs = [name for name in self.macs if name in self.ranges]
        return weights | {("input", name): INPUT_BITS if name in self.first else WIDTHS[0] for name in inputs}

    def least(self, tensor: tuple[str, str]) -> int:
        """A weight whose operations are not counted saves none: it keeps 16 bits."""
        if tensor[0] == "weight" and tensor[1] not in self.macs:
            return WIDTHS[0]
        return INPUT_BITS if tensor[0] == "input" and tensor[1] in self.first else WIDTHS[-1]

    def codes(self, name: str, bits: int):
        weight = self.exact[name]
        return quantize(weight, fit_symmetric(weight, bits, True), bits)

    @torch.no_grad()
    def set(self, bits: Tensors) -> None:
        layers = weight_layers(self.inner)
        for (what, name), width in bits.items():
            if what == "weight" and self.bits.get((what, name)) != width:
                layers[name].weight.copy_(self.codes(name, width).decode())
        self.bits = dict(bits)

    def bops(self, bits: Tensors) -> float:
        """B: percent of 32-bit operations."""
        own = sum(macs * bits["weight", name] * bits.get(("input", name), INPUT_BITS)
                  for name, macs in self.macs.items())
        return 100 * own / (32 * 32 * sum(self.macs.values()))


class Steps:
    """The widths on their way down; after every step `run` has them."""

    def __init__(self, network: Rounded, task: Task, run: Run):
        self.network, self.task, self.run = network, task, run

    def error(self, bits: Tensors) -> float:
        self.network.set(bits)
        return self.task.error(self.network)

    def lower(self, bits: Tensors) -> dict[tuple[str, str], Tensors]:
        """{tensor: the widths with that one lowered}."""
        return {tensor: {**bits, tensor: WIDTHS[WIDTHS.index(width) + 1]} for tensor, width in bits.items()
                if width > self.network.least(tensor)}

    def each(self, bits: Tensors, limit: float) -> tuple[Tensors, list]:
        saved = self.run.load()
        course = [] if saved is None else saved["course"]
        bits = bits if saved is None else saved["bits"]
        error = self.error(bits)
        while self.network.bops(bits) > limit:
            now, found = self.network.bops(bits), []
            for tensor, lowered in self.lower(bits).items():
                saving = now - self.network.bops(lowered)
                cost = self.error(lowered)
                found.append(((cost - error) / saving, -saving, tensor, cost))
            _, _, tensor, error = min(found)
            bits = self.lower(bits)[tensor]
            course.append([*tensor, bits[tensor], self.network.bops(bits), error])
            self.run.save({"bits": bits, "course": course})
        return bits, course

    def once(self, bits: Tensors, limit: float) -> tuple[Tensors, list]:
        """Every tensor at 8 and at 4 bits alone, from 16; then lowered in the order of loss, to the limit."""
        alone = [(tensor, b) for tensor in bits for b in (8, 4) if self.network.least(tensor) <= b < bits[tensor]]
        saved = self.run.load()
        errors = [] if saved is None else saved["errors"]
        for tensor, b in alone[len(errors):]:
            errors.append(self.error({**bits, tensor: b}))
            self.run.save({"errors": errors})
        course: list = []
        for error, b, tensor in sorted((error, -b, tensor) for error, (tensor, b) in zip(errors, alone, strict=True)):
            if self.network.bops(bits) <= limit:
                break
            bits = {**bits, tensor: min(-b, bits[tensor])}
            course.append([*tensor, bits[tensor], self.network.bops(bits), error])
        return bits, course


def _macs(graph: Graph, x: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}

    def see(node: Node, values: tuple[Tensor, ...], output: Tensor) -> None:
        if node.op in ("conv", "linear"):
            weight = node.module.weight
            found[node.name] = output.numel() / weight.shape[0] * weight.numel()

    with torch.no_grad():
        graph.run(x, see)
    return found


def _reads_input(graph: Graph, node: Node) -> bool:
    name = node.inputs[0]
    while graph.nodes[name].on_codes and graph.nodes[name].inputs:
        name = graph.nodes[name].inputs[0]
    return graph.nodes[name].op == "input"
