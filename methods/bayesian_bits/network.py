"""A traced network whose weights and activations pass through gated quantizers, one for each tensor.

Batch norm is folded while it trains: the quantizer sees W g / sigma_r (gain over the running deviation), and the
batch's own mean and deviation, those of the convolution with the float W, correct what comes out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.artifact import Topology
from ..core.errors import CompressError, ConfigError
from ..core.graph.build import NORMS
from ..core.graph.channels import find_pairs
from ..core.graph.fold import fold_batchnorm, norms_after
from ..core.graph.graph import Graph, Node, trace
from ..core.graph.operations import MOVES, SAME, count_macs
from .folding import Moments, folded_weight, linear_map, update_statistics
from .gated import alive, bits_of, gated_quantize, hard_concrete, thresholded

LEAST_RANGE = 1e-6
PHI2 = 6.0  # start of the channel gates: P(z > 0) = 0.9995


@dataclass(frozen=True)
class Point:
    """A quantized tensor: the weight of layer `name`, or (`weight` False) the value of node `name`.

    beta, signed  the range at the start: [-beta, beta] or [0, beta]
    kappa         MACs of the layer, or of an activation's readers, / the largest of a layer; None: no layer reads it
    channels      pruning gates, 0 where there are none;  bits  fixed width, None: learned
    """

    name: str
    weight: bool
    beta: float
    signed: bool
    kappa: float | None
    channels: int = 0
    bits: int | None = None


@dataclass(frozen=True)
class Wiring:
    """macs {layer: number}; sources {edge: (node whose value it reads, values per mean where pools average)};
    feeders {layer: the layer that it alone reads}."""

    macs: Mapping[str, int]
    sources: Mapping[str, tuple[str, int]]
    feeders: Mapping[str, str]


# --- which tensors are quantized ---------------------------------------------------------------------------


@torch.no_grad()
def survey(model: nn.Module, inputs: Tensor, *, prune: bool = True, residual: bool = False,
           bits: tuple[int, int] | None = None) -> tuple[list[Point], Wiring]:
    """The quantized tensors of `model` in eval mode, with ranges seen on `inputs`; weights first.

    A tensor is quantized right where it is computed (after a ReLU, before pools), once for all that read it.

    prune     channel gates on every layer but the last and those with groups
    residual  also quantize what no conv or linear reads: the branches of an addition
    bits      fixed widths of weights and activations, or None
    """
    graph, folded = trace(model), fold_batchnorm(model)[0]
    start = next(iter(graph.nodes))
    pooled, ranges, macs = {}, {}, {}
    read = {source_of(graph, name, {})[0] for node in graph for name in node.inputs if node.edges()}

    def see(node: Node, values: tuple[Tensor, ...], output: Tensor) -> None:
        if node.name in read:
            ranges[node.name] = find_range(output)
        if node.op == "avgpool":
            pooled[node.name] = values_per_mean(node, values[0])
        if node.op in ("conv", "linear"):
            macs[node.name] = count_macs(node.module, values, output) // len(output)

    graph.run(inputs, see)
    if not macs:
        raise CompressError(f"{graph.why_opaque()}the network has no convolution and no linear layer to quantize")
    sources = {edge: source_of(graph, name, pooled) for node in graph
               for edge, name in zip(node.edges(), node.inputs, strict=False)}
    largest, last, fixed = max(macs.values()), list(macs)[-1], (None, None) if bits is None else bits
    points = []
    for layer in macs:
        weight, grouped = folded.get_submodule(layer).weight, getattr(graph.nodes[layer].module, "groups", 1) > 1
        channels = len(weight) if prune and layer != last and not grouped else 0
        points.append(Point(layer, True, *find_range(weight), macs[layer] / largest, channels, fixed[0]))
    for name in dict.fromkeys(name for name, _ in sources.values() if name != start):
        read = sum(macs[layer] for layer in macs if sources[layer][0] == name)
        if read > 0 or residual:
            points.append(Point(name, False, *ranges[name], read / largest if read else None, bits=fixed[1]))
    pairs = find_pairs(model, (nn.Conv2d, nn.Linear))
    return points, Wiring(macs, sources, {pair.second: pair.first for pair in pairs})


def find_range(x: Tensor) -> tuple[float, bool]:
    """(beta, signed) of a tensor: beta = max(x), or max|x| where that is not positive."""
    low, high = (float(end) for end in torch.aminmax(x))
    if not math.isfinite(low + high):
        raise CompressError("an activation is not finite: look at the calibration inputs")
    beta = high if high > 0 else -low
    return max(beta, LEAST_RANGE) if beta > 0 else 1.0, low < 0


def values_per_mean(node: Node, x: Tensor) -> int:
    """How many values of x [N, C, H, W] an average pool takes for the mean in the middle of its output."""
    with torch.enable_grad():
        x = torch.zeros_like(x[:1]).requires_grad_()
        y = node.run(x)
        middle = y[..., y.shape[-2] // 2, y.shape[-1] // 2] if y.ndim == x.ndim else y.flatten()[:1]
        (share,) = torch.autograd.grad(middle.sum(), x)
    return round(1 / float(share.max()))


def source_of(graph: Graph, name: str, pooled: Mapping[str, int]) -> tuple[str, int]:
    """The node whose values `name` moves or averages, and how many of them one mean takes; `pooled` for each pool."""
    n = 1
    while graph.nodes[name].kind.acts in (MOVES, SAME) or graph.nodes[name].op == "avgpool":
        n *= pooled.get(name, 1)
        name = graph.nodes[name].inputs[0]
    return name, n


# --- the network -------------------------------------------------------------------------------------------


class GatedNetwork(nn.Module):
    """`model` with every point quantized. Gates are drawn in training mode and thresholded in eval mode.

    phi [Q, 4], beta [Q]  a row for each point;  phi2 [sum of channels]  in the order of the points
    masks                 {layer: bool [C_out]} where pruning is fixed
    stochastic            draw the gates; False: their value at u = 1/2
    dead_gates            a bit gate whose logit has fallen to -2 stays closed
    frozen_norms          batch norm keeps its running statistics: one convolution instead of two
    """

    def __init__(self, model: nn.Module, points: list[Point], wiring: Wiring, init: tuple[float, ...] = (6.0,) * 4, *,
                 masks: Mapping[str, Tensor] | None = None, stochastic: bool = True, dead_gates: bool = True,
                 frozen_norms: bool = False):
        super().__init__()
        device = next(model.parameters()).device
        self.network, self.points, self.wiring = model, points, wiring
        self.masks = {} if masks is None else dict(masks)
        self.stochastic, self.dead_gates, self.frozen_norms = stochastic, dead_gates, frozen_norms
        self.beta = nn.Parameter(torch.tensor([p.beta for p in points], device=device))
        self.phi = nn.Parameter(torch.tensor(init, dtype=torch.float32, device=device).repeat(len(points), 1))
        self.phi2 = nn.Parameter(torch.full((sum(p.channels for p in points),), PHI2, device=device))
        self.at = {(p.weight, p.name): i for i, p in enumerate(points)}
        graph, self.norms = trace(model), norms_after(model)
        self.graph = Graph([self._quantized(graph, node) for node in graph], graph.output, graph.opaque)
        self.drawn: tuple = ()
        self.taps: dict[str, dict[str, Tensor]] = {}  # {layer: where its output is left}

    def _quantized(self, graph: Graph, node: Node) -> Node:
        run = node.run
        if node.op in ("conv", "linear"):
            norm = self.norms.get(node.name)
            module = None if norm is None else graph.nodes[norm].module
            run = lambda x: self.multiply(self.at[True, node.name], node.module, module, x)  # noqa: E731
        elif node.name in self.norms.values():
            run = lambda x: x  # noqa: E731 - done with the layer before it
        if (False, node.name) not in self.at:
            return replace(node, run=run)
        return replace(node, run=lambda *inputs: self.quantize(self.at[False, node.name], run(*inputs)))

    def train(self, mode: bool = True) -> "GatedNetwork":
        """As of any module; frozen batch norms, those that no layer is in front of, too, stay as in eval mode."""
        super().train(mode)
        for module in self.network.modules() if self.frozen_norms else ():
            if isinstance(module, NORMS):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.drawn = self.draw()
        return self.graph.run(x, self._leave if self.taps else None)

    def tap(self, layer: str, values: dict[str, Tensor]) -> "Tap":
        """Until the tap is removed, every pass leaves in `values` what `layer` puts out, quantized where it is.

        ConfigError for what is no node. A conv or linear puts out what its batch norm would.
        """
        if layer not in self.graph.nodes:
            raise ConfigError(f"a link names the layer {layer!r}; the network runs: {', '.join(self.graph.nodes)}")
        self.taps[layer] = values
        return Tap(self.taps, layer)

    def _leave(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if node.name in self.taps:
            self.taps[node.name][node.name] = output

    def uniform(self, phi: Tensor) -> Tensor:
        return torch.rand_like(phi) if self.stochastic else torch.full_like(phi, 0.5)

    def draw(self) -> tuple:
        """Bit gates per point, the number of residuals they let through, channel gates per layer, range per point."""
        if self.training:
            z, z2 = (hard_concrete(phi, self.uniform(phi)) for phi in (self.phi, self.phi2))
            z = z * alive(self.phi) if self.dead_gates else z
        else:
            z, z2 = thresholded(self.phi), thresholded(self.phi2)
        levels = (z.detach() > 0).int().cumprod(1).sum(1).tolist()  # the one wait for the device in a step
        return z.unbind(), levels, self.per_layer(z2) | self.masks, self.beta.unbind()

    def per_layer(self, channels: Tensor) -> dict[str, Tensor]:
        """{layer: [C_out]} of the pruned layers, from a vector like phi2."""
        pruned = [p for p in self.points if p.channels]
        return dict(zip([p.name for p in pruned], channels.split([p.channels for p in pruned]), strict=True))

    def quantize(self, i: int, x: Tensor) -> Tensor:
        (z, levels, z2, beta), point = self.drawn, self.points[i]
        prune = z2.get(point.name) if point.weight else None
        prune = None if prune is None else prune.to(x)
        if point.bits is not None:
            return gated_quantize(x.float(), beta[i], None, prune, signed=point.signed, first=point.bits)
        return gated_quantize(x.float(), beta[i], z[i], prune, signed=point.signed, levels=levels[i])

    def multiply(self, i: int, layer: nn.Module, norm: nn.Module | None, x: Tensor) -> Tensor:
        """A conv or linear and the batch norm behind it, folded."""
        if norm is None:
            return linear_map(layer, x, self.quantize(i, layer.weight), layer.bias)
        sigma = (norm.running_var + norm.eps).sqrt()
        g, b = (norm.weight, norm.bias) if norm.affine else (torch.ones_like(sigma), torch.zeros_like(sigma))
        weight = self.quantize(i, folded_weight(layer, norm))
        bias = torch.zeros_like(sigma) if layer.bias is None else layer.bias
        if not self.training or self.frozen_norms:
            return linear_map(layer, x, weight, b + (bias - norm.running_mean) * g / sigma)
        plain = linear_map(layer, x, layer.weight, None).float()  # of the float, unpruned weight
        var, mean = Moments.apply(plain)
        batch, shape = (var + norm.eps).sqrt(), (1, -1, *[1] * (plain.ndim - 2))
        y = linear_map(layer, x, weight, None).float()
        update_statistics(norm, mean + bias, var, plain.numel() // len(mean))
        return torch.addcmul((b - g * mean / batch).reshape(shape), y, (sigma / batch).reshape(shape))

    def folded_weights(self) -> dict[str, Tensor]:
        """{layer: weight as the quantizer sees it}."""
        found = {}
        for name in self.wiring.macs:
            norm = self.norms.get(name)
            norm = None if norm is None else self.graph.nodes[norm].module
            found[name] = folded_weight(self.graph.nodes[name].module, norm)
        return found

    def widths(self, phi: Tensor | None = None) -> list[int]:
        """Bits of each point with its gates thresholded; of other logits than its own where they are given."""
        learned = bits_of(self.phi.detach() if phi is None else phi)
        return [b if p.bits is None else p.bits for p, b in zip(self.points, learned, strict=True)]

    def kept_channels(self, phi2: Tensor | None = None) -> dict[str, Tensor]:
        """{layer: bool [C_out]} of the pruned layers, with their gates thresholded, as `widths`."""
        return self.per_layer(thresholded(self.phi2.detach() if phi2 is None else phi2).bool()) | self.masks


@dataclass(frozen=True)
class Tap:
    """A tap into a network, to be removed as torch's hooks are."""

    taps: dict[str, dict[str, Tensor]]
    layer: str

    def remove(self) -> None:
        del self.taps[self.layer]


def fix_gates(network: GatedNetwork) -> tuple[GatedNetwork, Topology]:
    """The network with thresholded gates: one width per point, channel masks, batch norm folded into weights and
    biases; and what was folded."""
    module, topology = fold_batchnorm(network.network)
    points = [replace(point, beta=beta, bits=bits, channels=0) for point, beta, bits
              in zip(network.points, network.beta.tolist(), network.widths(), strict=True)]
    fixed = GatedNetwork(module.to(network.beta.device), points, network.wiring, masks=network.kept_channels())
    return fixed.eval(), topology
