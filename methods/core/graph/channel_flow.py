"""Forward through a pruned network: which channels are constant, and which belong together.

In the order of execution: a channel is constant if it is the same number at every place of every input. That is so
where all weights into it are pruned, and passes on through batch norm, ReLU and pools; through a convolution only where
no zero padding makes its border differ. Channels that an addition, a depthwise or a grouped convolution ties together
have one class.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from .graph import Graph, Node

POINTWISE = ("relu", "clamp", "squash", "curve", "identity")  # of one input: a channel's values to values of the same
SPATIAL, FLAT, FEATURES = "spatial", "flat", "features"  # [N, C, H, W]; [N, C H W] or [N, C]; [..., C]


@dataclass(frozen=True, eq=False)
class Value:
    """The channels of one node's output.

    layout    SPATIAL, FLAT or FEATURES: which axis is meant; None: not known, so all of it is live and varies
    classes   int [C]
    constant  float64 [C], NaN where it varies
    joined    a flatten made H W columns, side by side, of each of the C channels; how many, its reader knows
    """

    layout: str | None = None
    classes: np.ndarray | None = None
    constant: np.ndarray | None = None
    joined: bool = False


UNKNOWN = Value()


@dataclass(frozen=True, eq=False)
class Reading:
    """How a conv or linear reads its input.

    open    bool [O, I / groups]: the channel read there was not taken into the bias
    kept    bool [O, I / groups]: a weight is kept there
    moved   float64 [O]: what the bias gains by that
    source  int [I]: the input's channel behind each of the layer's; None where it is not known
    """

    open: np.ndarray
    kept: np.ndarray
    moved: np.ndarray
    source: np.ndarray | None

    @property
    def uses(self) -> np.ndarray:
        """bool [O, I / groups]: kept weights that do not read what became bias."""
        return self.open & self.kept


class Classes:
    """Sets of channels that go together (union-find)."""

    def __init__(self):
        self.parent: list[int] = []
        self.pinned: set[int] = set()

    def new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, one: int) -> int:
        while self.parent[one] != one:
            self.parent[one] = self.parent[self.parent[one]]
            one = self.parent[one]
        return one

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        for one, other in zip(ones.tolist(), others.tolist(), strict=True):
            self.parent[self.find(other)] = self.find(one)

    def roots(self) -> np.ndarray:
        return np.array([self.find(one) for one in range(len(self.parent))], np.int64)


class Forward:
    """Values and readings, node by node."""

    def __init__(self, graph: Graph, constant_at: Callable, fixed: Collection[str], grouped: Collection[str],
                 masks: Mapping[str, Tensor]):
        self.graph, self.constant_at, self.fixed, self.grouped, self.masks = graph, constant_at, fixed, grouped, masks
        self.classes, self.values, self.readings = Classes(), {}, {}

    def value_of(self, node: Node) -> Value:
        inputs = [self.values[name] for name in node.inputs]
        if node.op in ("conv", "linear"):
            return self._multiplied(node, inputs[0])
        if node.op in POINTWISE and len(inputs) == 1:
            return inputs[0] if inputs[0].classes is None else replace(
                inputs[0], constant=_through(node, inputs[0].constant))
        rules = {"bn": self._normalised, "maxpool": self._pooled, "avgpool": self._pooled, "add": self._added,
                 "flatten": self._flattened, "cat": self._concatenated}
        return rules[node.op](node, inputs) if node.op in rules else UNKNOWN

    def _multiplied(self, node: Node, value: Value) -> Value:
        layer, conv = node.module, isinstance(node.module, nn.Conv2d)
        weight = layer.weight.detach().cpu().double()
        weight = (weight * self.masks[node.name].cpu() if node.name in self.masks else weight).numpy()
        out, groups = weight.shape[0], layer.groups if conv else 1
        source = _source(value, weight.shape[1] * groups, (SPATIAL,) if conv else (FLAT, FEATURES))
        read = np.full(weight.shape[1] * groups, np.nan)
        if source is not None:
            read = self.constant_at(node.name, value.constant)[source]
        padded = conv and layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)
        uniform = ~np.isnan(read) & ((read == 0) | (not padded))
        taken = uniform & (node.name not in self.fixed) & ((read == 0) | self._has_bias(node))
        # [O, I / groups]: what each output channel reads
        into = (np.arange(out) // (out // groups) * weight.shape[1])[:, None] + np.arange(weight.shape[1])
        sums, kept = weight.reshape(*weight.shape[:2], -1).sum(2), (weight.reshape(*weight.shape[:2], -1) != 0).any(2)
        share = sums * np.where(uniform, read, 0.0)[into]
        self.readings[node.name] = Reading(~taken[into], kept, (share * taken[into]).sum(1), source)
        bias = 0.0 if layer.bias is None else numbers(layer.bias)
        constant = np.where((kept & ~uniform[into]).any(1), np.nan, share.sum(1) + bias)
        classes = self.classes.new(out)
        if groups > 1 or node.name in self.grouped:
            self._tie(classes, None if source is None else value.classes[source], groups)
        layout = SPATIAL if conv else FLAT if value.layout == FLAT else FEATURES
        return Value(layout, classes, constant)

    def _has_bias(self, node: Node) -> bool:
        return node.module.bias is not None or self.graph.norm_after(node.name) is not None

    def _tie(self, outputs: np.ndarray, inputs: np.ndarray | None, groups: int) -> None:
        """Whole groups of a grouped convolution go, or stay."""
        if inputs is None:
            self.classes.pinned.update(outputs.tolist())
            return
        for out, into in zip(np.split(outputs, groups), np.split(inputs, groups), strict=True):
            together = np.concatenate([out, into])
            self.classes.join(np.full(len(together), together[0]), together)

    def _normalised(self, node: Node, inputs: list[Value]) -> Value:
        value, norm = inputs[0], node.module
        source = _source(value, norm.num_features, (SPATIAL, FLAT))
        if source is None:
            return UNKNOWN
        gain = 1 / np.sqrt(numbers(norm.running_var) + norm.eps)
        gain = gain * numbers(norm.weight) if norm.affine else gain
        shift = numbers(norm.bias) if norm.affine else 0.0
        constant = gain * (value.constant[source] - numbers(norm.running_mean)) + shift
        return Value(value.layout, value.classes[source], np.where(gain == 0, shift, constant))

    def _pooled(self, node: Node, inputs: list[Value]) -> Value:
        value, pool = inputs[0], node.module
        if value.layout != SPATIAL:
            return UNKNOWN
        if node.op == "maxpool":
            return value
        if not isinstance(pool, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            return UNKNOWN
        seen = self.constant_at(node.name, value.constant)
        even = isinstance(pool, nn.AdaptiveAvgPool2d) or pool.divisor_override is None and not (
            pool.count_include_pad and np.any(pool.padding))  # each window is divided by the inputs in it
        return replace(value, constant=seen if even else np.where(seen == 0, seen, np.nan))

    def _added(self, node: Node, inputs: list[Value]) -> Value:
        if len(inputs) != 2:
            return UNKNOWN
        a, b = inputs
        if a.classes is None or b.classes is None or (a.layout, a.joined, len(a.classes)) != (
                b.layout, b.joined, len(b.classes)) or a.layout == FEATURES:
            return UNKNOWN
        self.classes.join(a.classes, b.classes)
        return replace(a, constant=sum(self.constant_at(edge, value.constant)
                                       for edge, value in zip(node.edges(), inputs, strict=True)))

    def _concatenated(self, node: Node, inputs: list[Value]) -> Value:
        if any(v.classes is None or v.joined or v.layout not in (SPATIAL, FLAT) for v in inputs):
            return UNKNOWN
        if len({v.layout for v in inputs}) != 1 or not _joins_channels(node, inputs):
            return UNKNOWN
        return Value(inputs[0].layout, np.concatenate([v.classes for v in inputs]),
                     np.concatenate([v.constant for v in inputs]))

    def _flattened(self, node: Node, inputs: list[Value]) -> Value:
        value = inputs[0]
        if not keeps_batch(node):
            return UNKNOWN
        if value.classes is None or value.layout == FEATURES:
            return Value(FLAT)
        return replace(value, layout=FLAT, joined=value.joined or value.layout == SPATIAL)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _through(node: Node, constant: np.ndarray) -> np.ndarray:
    """A pointwise operation on the constants; NaN stays NaN."""
    if node.op == "identity":
        return constant
    found = node.run(torch.from_numpy(constant).reshape(1, -1, 1, 1)).double().reshape(-1).numpy()
    return np.where(np.isnan(constant), np.nan, found)


def _source(value: Value, width: int, layouts: tuple[str, ...]) -> np.ndarray | None:
    """int [width]: the channel of `value` behind each of the `width` that a layer reads."""
    if value.classes is None or value.layout not in layouts or not len(value.classes):
        return None
    copies, left = divmod(width, len(value.classes))
    if left or copies != 1 and not value.joined:
        return None
    return np.repeat(np.arange(len(value.classes)), copies)


def keeps_batch(flatten: Node) -> bool:
    """Whether a flatten joins all dimensions but the first: only then are a channel's columns side by side."""
    try:
        return flatten.run(torch.empty(2, 3, 4, 5, device="meta")).shape == (2, 60)
    except (RuntimeError, TypeError, IndexError, AttributeError):  # a view to fixed sizes
        return False


def _joins_channels(node: Node, inputs: list[Value]) -> bool:
    """Whether a concatenation is along the channels."""
    tail = (4, 5) if inputs[0].layout == SPATIAL else ()
    try:
        joined = node.run(*(torch.empty(2, len(v.classes), *tail, device="meta") for v in inputs))
    except (RuntimeError, TypeError, IndexError, AttributeError):
        return False
    return joined.shape == (2, sum(len(v.classes) for v in inputs), *tail)
