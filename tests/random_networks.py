"""Random small networks, compressed in random ways: what the integer networks are compared on.

`python -m tests.random_networks FIRST COUNT` compares as many as one likes, and names those that differ.
"""

import dataclasses
import random
import sys

import torch
from torch import Tensor, nn

from methods.core.artifact import ActivationQuantizer, Affine, Codebook, CompressedModel, CompressedTensor, Levels
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_asymmetric, fit_symmetric, quantize
from methods.core.fit.windows import OPTIONS, find_window, keep_24
from methods.core.graph.build import apply, assemble, weight_layers
from methods.core.graph.graph import trace
from methods.engine.fast import FastNetwork
from methods.engine.verify import verify

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16, 17)


class Sum(nn.Module):
    """The sum of two branches, read once or more."""

    def __init__(self, one: nn.Module, other: nn.Module, twice: bool):
        super().__init__()
        self.one, self.other, self.twice = one, other, twice

    def forward(self, x):
        y = self.one(x) + self.other(x)
        return torch.relu(y) + y if self.twice else y


class Drawing:
    """One network while it is drawn: `layers` so far, and the shape (channels, height, width) of what they return."""

    def __init__(self, draw: random.Random):
        self.draw, self.layers = draw, []
        self.channels, self.sides = draw.choice(WIDTHS[:6]), [draw.randint(1, 9), draw.randint(1, 9)]
        self.input_shape = (self.channels, *self.sides)

    def side(self, side: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
        return (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1

    def conv(self, keep: bool = False) -> nn.Sequential | None:
        """A conv, maybe with batch norm, of any geometry; `keep` keeps the sides. None where it has no output."""
        draw = self.draw
        groups = draw.choice([g for g in (1, 1, 1, 2, 3, self.channels) if self.channels % g == 0])
        out = groups * draw.choice(WIDTHS[:6]) if groups > 1 else draw.choice(WIDTHS)
        kernel = [draw.choice((1, 3)) if keep else draw.randint(1, 4) for _ in range(2)]
        dilation = [1 if keep else draw.choice((1, 1, 2, 3)) for _ in range(2)]
        stride = [1 if keep else draw.choice((1, 1, 2, 3)) for _ in range(2)]
        padding = [k // 2 if keep else draw.choice((0, k // 2, draw.randint(0, 3))) for k in kernel]
        sides = [self.side(*given) for given in zip(self.sides, kernel, stride, padding, dilation, strict=True)]
        if min(sides) < 1 or max(sides) > 12:
            return None
        layers = [nn.Conv2d(self.channels, out, kernel, stride, padding, dilation, groups, bias=draw.random() < 0.5)]
        if draw.random() < 0.5:
            layers.append(nn.BatchNorm2d(out))
        if keep and draw.random() < 0.2:
            layers.append(nn.Dropout())
        self.channels, self.sides = out, sides
        return nn.Sequential(*layers)

    def sum(self) -> nn.Sequential:
        """A residual: one or two convs beside nothing or a conv."""
        before = self.channels
        body = [self.conv(keep=True)]
        if self.draw.random() < 0.5:
            body += [nn.ReLU(), self.conv(keep=True)]
        shortcut = nn.Conv2d(before, self.channels, 1) if before != self.channels or self.draw.random() < 0.3 \
            else nn.Identity()
        branches = [nn.Sequential(*body), shortcut]
        self.draw.shuffle(branches)
        return nn.Sequential(Sum(*branches, self.draw.random() < 0.2))

    def pool(self) -> nn.Module | None:
        kernel, stride = [self.draw.randint(1, 3) for _ in range(2)], self.draw.randint(1, 3)
        maximum = self.draw.random() < 0.7
        padding = [self.draw.randint(0, k // 2) if maximum else 0 for k in kernel]
        sides = [self.side(s, k, stride, p, 1) for s, k, p in zip(self.sides, kernel, padding, strict=True)]
        if min(sides) < 1:
            return None
        self.sides = sides
        return nn.MaxPool2d(kernel, stride, padding) if maximum else nn.AvgPool2d(tuple(kernel), stride)

    def step(self) -> None:
        kind = self.draw.choice((self.conv, self.conv, self.sum, self.sum, self.pool, nn.ReLU))
        layer = kind()
        self.layers += [] if layer is None else [layer, *([nn.ReLU()] if self.draw.random() < 0.6 else [])]

    def finished(self) -> nn.Sequential:
        if self.draw.random() < 0.5:
            self.layers.append(nn.AdaptiveAvgPool2d(1))
            self.sides = [1, 1]
        width, hidden = self.channels * self.sides[0] * self.sides[1], self.draw.choice(WIDTHS)
        more = [nn.Linear(width, hidden), nn.ReLU()] if self.draw.random() < 0.3 else []
        return nn.Sequential(*self.layers, nn.Flatten(), *more, nn.Linear(hidden if more else width, 3))


def draw_network(seed: int) -> tuple[nn.Module, CompressedModel, Tensor, tuple[str, ...]]:
    """(model, compressed, inputs [N, C, H, W], names of layers to run in float), the same for the same seed."""
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        drawing = Drawing(draw)
        for _ in range(draw.randint(1, 5)):
            drawing.step()
        model = drawing.finished().eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(-1, 1)
            norm.bias.normal_(std=0.5)
        x = torch.randn(draw.choice((1, 2, 3)), *drawing.input_shape)
        if draw.random() < 0.3:
            x = x.contiguous(memory_format=torch.channels_last)
        sparse = draw.random() < 0.2
        weights = {name: draw_weights(draw, layer.weight, sparse) for name, layer in weight_layers(model).items()}
        plain = assemble(model, weights)
        ranges = {edge: draw_quantizer(draw, found)
                  for edge, found in calibrate(apply(plain, model), x, 8).items()}
    windows = draw_windows(draw, model, ranges, sparse) if draw.random() < 0.4 else {}
    in_float = tuple(draw.sample(list(weights), 1)) if draw.random() < 0.15 else ()
    return model, dataclasses.replace(plain, activations=ranges, windows=windows), x, in_float


def draw_weights(draw: random.Random, weight: Tensor, sparse: bool) -> CompressedTensor:
    """On any kind of grid, some of them pruned."""
    bits, kind = draw.randint(2, 8), draw.choice(("symmetric", "symmetric", "asymmetric", "far", "levels", "codebook"))
    mask = torch.rand(weight.shape) < draw.choice((1.0, 1.0, 0.5))
    mask &= keep_24(weight) if sparse else True
    if kind in ("symmetric", "asymmetric"):
        fit = fit_symmetric if kind == "symmetric" else fit_asymmetric
        return quantize(weight, fit(weight, bits), bits, mask)
    if kind == "far":  # the code of 0 is anywhere
        grid = Affine(torch.rand(len(weight)) + 0.01, torch.randint(0, 1 << bits, (len(weight),)).int(), signed=False)
        return CompressedTensor.of(torch.randint(0, 1 << bits, weight.shape), grid, bits, mask)
    codes = torch.randint(0, 4, weight.shape)
    grid = Levels(torch.rand(len(weight)) + 0.01, torch.tensor([-4, -1, 1, 2]).int()) if kind == "levels" \
        else Codebook(torch.randn(4) * 10.0 ** -torch.randint(0, 5, (4,)))
    return CompressedTensor.of(codes, grid, 2, mask)


def draw_quantizer(draw: random.Random, found: ActivationQuantizer) -> ActivationQuantizer:
    """As calibrated, unsigned without zero point, or anything."""
    kind = draw.choice(("as it is", "as it is", "unsigned", "unsigned", "any"))
    if kind == "as it is":
        return found
    if kind == "unsigned":
        return ActivationQuantizer(found.scale * draw.choice((1.0, 0.5, 1.3)))
    bits, signed = draw.randint(2, 12), draw.random() < 0.3
    low = -(1 << bits - 1) if signed else 0
    return ActivationQuantizer(found.scale * 2.0 ** (8 - bits), draw.randint(low, low + (1 << bits) - 1), bits, signed)


def draw_windows(draw: random.Random, model: nn.Module, ranges: dict, sparse: bool) -> dict:
    """SPARQ's, at most layers that may have one."""
    found = {}
    for node in trace(model):
        fits = node.op in ("conv", "linear") and getattr(node.module, "groups", 1) == 1
        if fits and ranges[node.name] == dataclasses.replace(ranges[node.name], zero=0, bits=8, signed=False) \
                and draw.random() < 0.8:
            found[node.name] = find_window(draw.choice(list(OPTIONS)), draw.random() < 0.5, draw.random() < 0.8, sparse)
    return found


def compare(seed: int) -> tuple[int, int, list[str]]:
    """(layers, codes that differ anywhere, slow nodes) of one drawn network."""
    model, compressed, x, in_float = draw_network(seed)
    fast = FastNetwork(compressed, model, in_float)
    verdict = verify(fast, [(x, None)], len(x), len(x))
    return len(fast.layers), verdict.wrong + verdict.wrong_outputs + verdict.reference_wrong, fast.slow_nodes


def main(first: int, count: int) -> None:
    layers = wrong = slow = 0
    for seed in range(first, first + count):
        found = compare(seed)
        layers, slow = layers + found[0], slow + len(found[2])
        if found[1]:
            wrong += 1
            sys.stdout.write(f"network {seed}: {found[1]} codes differ\n")
    sys.stdout.write(f"{count} networks, {layers} layers, {slow} slow nodes, {wrong} networks that differ\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
