"""What activations are taken for without data: normal distributions per channel, from the batch norms of a network.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019. What an
operation makes of them is exact where the paper says so, else an estimate; None where there is none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import GraphError
from ..graph.graph import Graph, Node

SAMPLES = 4096  # of each channel, for operations without a closed form
PICTURE = (4, 6)  # a small picture, on which channels are followed through what moves values


@dataclass(frozen=True, eq=False)
class Normal:
    """What an activation is taken for: N(mean, std^2) per channel, cut off below 0 if `rectified`. float64 [C].

    top  what a clamp cuts off above: it limits the range, but is left out of the moments
    """

    mean: Tensor
    std: Tensor
    rectified: bool = False
    top: float = math.inf

    def moments(self) -> tuple[Tensor, Tensor]:
        """(expectation, variance) per channel."""
        if not self.rectified:
            return self.mean, self.std.square()
        z = self.mean / torch.where(self.std > 0, self.std, 1.0)
        z = torch.where(self.std > 0, z, torch.where(self.mean > 0, torch.inf, -torch.inf))
        density, below = (-z.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(z)
        first = self.std * density + self.mean * below
        second = (self.mean.square() + self.std.square()) * below + self.mean * self.std * density
        return first, (second - first.square()).clamp_min(0)

    def range(self, sigmas: float) -> tuple[float, float]:
        low, high = float((self.mean - sigmas * self.std).min()), float((self.mean + sigmas * self.std).max())
        low, high = (max(low, 0.0), max(high, 0.0)) if self.rectified else (low, high)
        return low, max(min(high, self.top), low)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """float32 [n, C, 1, 1] samples."""
        x = self.mean + self.std * torch.randn(n, len(self.mean), dtype=torch.float64, generator=generator)
        x = x.clamp_min(0) if self.rectified else x
        return x.clamp_max(self.top).float()[:, :, None, None]


def read_normal(norm: nn.Module) -> Normal:
    """The output of a batch norm: N(beta, gamma^2)."""
    zero = torch.zeros(norm.num_features, dtype=torch.float64)
    if not norm.affine:
        return Normal(zero, zero + 1)
    return Normal(norm.bias.detach().cpu().double(), norm.weight.detach().cpu().double().abs())


class Distributions:
    """What the output of every node is taken for, from the batch norms, folded or not, of a network.

    outputs  {layer: Normal} of those whose batch norm is folded;  weights  {layer: weight}
    seen     {node: Normal}, None where nothing is known
    moved    {node: [1, ...] which channel of `seen` lies where} of values that were moved about
    """

    def __init__(self, graph: Graph, outputs: Mapping[str, Normal], weights: Mapping[str, Tensor]):
        self.outputs, self.weights = outputs, weights
        self.seen: dict[str, Normal | None] = {}
        self.moved: dict[str, Tensor] = {}
        self.raw: set[str] = set()  # the network's input, and what is computed from it alone: standardised
        rules = {"conv": self._multiplied, "linear": self._multiplied, "add": self._added, "bn": self._normalised,
                 "cat": self._joined, "view": self._placed, "identity": self._placed, "squash": self._sampled,
                 "curve": self._sampled}
        for node in graph:
            if node.op == "input" or node.kind.acts == "real" and node.op != "bn" and set(node.inputs) <= self.raw:
                self.raw.add(node.name)
                self.seen[node.name] = Normal(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
            elif node.op not in ("view", "identity") and any(self._unplaced(name) for name in node.inputs):
                self.seen[node.name] = self.outputs.get(node.name)
            else:
                inputs = [self.seen[name] for name in node.inputs]
                rule = rules.get(node.op, self._passed if node.on_codes or node.op == "avgpool" else self._unknown)
                self.seen[node.name] = rule(node, inputs)

    def placed(self) -> dict[str, Normal | None]:
        """`seen`, and None where the channels lie in no dimension of their own: a layer reads something else there."""
        return {name: None if self._unplaced(name) else normal for name, normal in self.seen.items()}

    def _unplaced(self, name: str) -> bool:
        """Whether nothing is known of a value, or its channels lie in no dimension of their own."""
        return self.seen[name] is None or name in self.moved

    def _multiplied(self, node: Node, inputs: list[Normal]) -> Normal:
        return self.outputs[node.name] if node.name in self.outputs else propagated(node, inputs[0], self.weights)

    def _added(self, node: Node, inputs: list[Normal]) -> Normal | None:
        width = max(len(normal.mean) for normal in inputs)
        even = all(width % len(normal.mean) == 0 for normal in inputs)
        return sum_of([normal.moments() for normal in inputs]) if even else None

    def _normalised(self, node: Node, inputs: list[Normal]) -> Normal:
        return read_normal(node.module)

    def _passed(self, node: Node, inputs: list[Normal]) -> Normal | None:
        normal = inputs[0]
        if node.bounds is None:
            keeps = node.module is not None or node.op != "avgpool" or node.run(
                torch.empty(2, 3, *PICTURE, device="meta")).shape[:2] == (2, 3)
            return normal if keeps else None
        return replace(normal, rectified=normal.rectified or node.bounds[0] == 0, top=min(normal.top, node.bounds[1]))

    def _joined(self, node: Node, inputs: list[Normal]) -> Normal | None:
        """Channels one after the other; where only some are rectified all become their moments."""
        tensors = [torch.empty(2, len(normal.mean), *PICTURE, device="meta") for normal in inputs]
        if _result(node, tensors, (2, sum(len(normal.mean) for normal in inputs), *PICTURE)) is None:
            return None
        if len({normal.rectified for normal in inputs}) > 1:
            inputs = [Normal(mean, variance.sqrt()) for mean, variance in (normal.moments() for normal in inputs)]
        return Normal(torch.cat([normal.mean for normal in inputs]), torch.cat([normal.std for normal in inputs]),
                      inputs[0].rectified, max(normal.top for normal in inputs))

    def _placed(self, node: Node, inputs: list[Normal | None]) -> Normal | None:
        """Follows the numbers of the channels through a picture of them; a channel must be one number all over."""
        normal, name = inputs[0], node.inputs[0]
        if normal is None or len(normal.mean) == 1:
            return normal
        numbers = self.moved.get(name, _numbered(normal))
        shapes = {one: self.moved[one].shape if one in self.moved else (1, len(self.seen[one].mean), *PICTURE)
                  for one in node.shaped_by if self.seen[one] is not None}
        if len(shapes) < len(node.shaped_by) or (found := _result(node.at(shapes), [numbers])) is None:
            return None
        flat = found.flatten(2) if found.ndim > 2 else found[..., None]
        if found.ndim in (2, 4) and len(found) == 1 and bool((flat == flat[..., :1]).all()):
            order = flat[0, :, 0].long()
            return replace(normal, mean=normal.mean[order], std=normal.std[order])
        self.moved[node.name] = found
        return normal

    def _sampled(self, node: Node, inputs: list[Normal]) -> Normal | None:
        """Moments of an operation on every value by itself, from independent samples of its inputs."""
        generator = torch.Generator().manual_seed(0)
        found = _result(node, [normal.draw(SAMPLES, generator) for normal in inputs])
        if found is None or found.ndim != 4:
            return None
        values = found.detach().double()[:, :, 0, 0]
        return Normal(values.mean(0), values.std(0))

    def _unknown(self, node: Node, inputs: list[Normal]) -> None:
        return None


def _numbered(normal: Normal) -> Tensor:
    return torch.arange(len(normal.mean), dtype=torch.float32).reshape(1, -1, 1, 1).expand(1, -1, *PICTURE)


def _result(node: Node, tensors: list[Tensor], shape: tuple[int, ...] | None = None) -> Tensor | None:
    """What a node makes of `tensors`; None where it does not take them, or returns another shape."""
    try:
        found = node.run(*tensors)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return found if shape is None or found.shape == shape else None


def sum_of(moments: list[tuple[Tensor, Tensor]]) -> Normal:
    """A sum of independent values; one with a moment per channel counts alike in all columns after a flatten."""
    width = max(len(mean) for mean, _ in moments)
    mean, variance = (sum(part.repeat_interleave(width // len(part)) for part in parts)
                      for parts in zip(*moments, strict=True))
    return Normal(mean, variance.sqrt())


def propagated(node: Node, inputs: Normal, weights: Mapping[str, Tensor]) -> Normal:
    """Output of a layer without batch norm, from independent inputs."""
    mean, variance = inputs.moments()
    weight, bias = weights[node.name], node.module.bias
    mean, variance = respond(node, weight, mean), respond(node, weight.square(), variance)
    return Normal(mean if bias is None else mean + bias.detach().double(), variance.sqrt())


def respond(node: Node, weight: Tensor, x: Tensor) -> Tensor:
    """[C_out] output of a layer with `weight` to an input that is x[c] all over channel c."""
    groups = getattr(node.module, "groups", 1)
    summed = weight.reshape(*weight.shape[:2], -1).sum(2).reshape(groups, -1, weight.shape[1])
    copies, rest = divmod(groups * weight.shape[1], len(x))  # H x W columns per channel after a flatten
    if rest:
        raise GraphError(f"dfq: {node.name} reads {groups * weight.shape[1]} inputs made from {len(x)} channels: a "
                         "flatten must join channels and pixels")
    return torch.einsum("gmc,gc->gm", summed, x.repeat_interleave(copies).reshape(groups, -1)).reshape(-1)
