"""Distributions without data: moved, joined, clamped and curved values against sums, integrals and index pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

from methods import Budget, dfq
from methods.core.fit.normals import Distributions, Normal
from methods.core.graph.graph import trace
from methods.engine.exact import IntegerNetwork
from methods.engine.reference import ReferenceRun
from tests.foreign import Net, b, shuffled

MEAN, STD = torch.linspace(-2, 2, 8, dtype=torch.float64), torch.linspace(0.5, 2, 8, dtype=torch.float64)


def seen(run, **layers):
    """What the output of `run` is taken for, whose input is N(MEAN, STD^2)."""
    graph = trace(Net(run, **layers).eval())
    weights = {name: layers[name].weight.detach().double() for name in layers if hasattr(layers[name], "weight")}
    return Distributions(graph, {"a": Normal(MEAN, STD)}, weights).seen[graph.output]


def near(normal, mean, std, rtol=0.0):
    torch.testing.assert_close(normal.mean, mean, rtol=rtol, atol=1e-12 + rtol)
    torch.testing.assert_close(normal.std, std, rtol=rtol, atol=1e-12 + rtol)


def test_channels_are_followed_through_what_moves_them():
    order = shuffled(torch.arange(8.0).reshape(1, 8, 1, 1), 4).flatten().long()
    near(seen(lambda m, x: shuffled(x, 4)), MEAN[order], STD[order])
    near(seen(lambda m, x: x.flip(1)[:, 1:4]), MEAN.flip(0)[1:4], STD.flip(0)[1:4])
    near(seen(lambda m, x: torch.split(x, [3, 5], 1)[1]), MEAN[3:], STD[3:])
    assert seen(lambda m, x: m.b(x.permute(0, 2, 3, 1)), b=nn.Linear(8, 4)) is None  # the channels are the last


def test_joined_channels_are_one_after_the_other():
    near(seen(lambda m, x: torch.cat([x, x * 1], 1)[:, :8]), MEAN, STD)
    joined = seen(lambda m, x: torch.cat([x.relu(), x], 1))
    first, second = Normal(MEAN, STD, True).moments()
    near(joined, torch.cat([first, MEAN]), torch.cat([second.sqrt(), STD]))
    both = seen(lambda m, x: torch.cat([x.relu(), F.relu6(x)], 1))
    assert both.rectified and len(both.mean) == 16
    assert seen(lambda m, x: torch.cat([x, x], 2)) is None  # pictures side by side


def test_a_clamp_ends_the_range():
    normal = seen(lambda m, x: F.relu6(x))
    assert normal.range(6.0) == (0.0, 6.0) and normal.range(0.5) == (0.0, 3.0)


def power_under_density(x, curve, k, density):
    return float(curve(torch.tensor(x))) ** k * density.pdf(x)


@pytest.mark.parametrize("curve", [F.silu, torch.sigmoid, F.hardswish, F.gelu])
def test_curves_have_the_moments_of_the_integral(curve):
    normal = seen(lambda m, x: curve(x))
    for channel in (0, 3, 7):
        first, second = (integrate.quad(power_under_density, -14, 14, args=(
            curve, k, stats.norm(float(MEAN[channel]), float(STD[channel]))))[0] for k in (1, 2))
        std = math.sqrt(second - first**2)
        assert abs(float(normal.mean[channel]) - first) < 5 * std / 64  # 4096 samples
        assert abs(float(normal.std[channel]) / std - 1) < 0.1


def test_products_are_of_independent_values():
    normal = seen(lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)))
    gate, curve = seen(lambda m, x: torch.sigmoid(x)), Normal(MEAN, STD)
    want = curve.mean * gate.mean
    variance = (curve.mean**2 + curve.std**2) * (gate.mean**2 + gate.std**2) - want**2
    near(normal, want, variance.sqrt(), rtol=0.12)


def test_a_normalising_head_gives_what_is_taken_as_standardised():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv((x - self.mean) / 0.25)

    head = Head().eval()
    found = Distributions(trace(head), {}, {"conv": torch.ones(4, 3, 1, 1, dtype=torch.float64)}).seen["conv"]
    near(found, head.conv.bias.detach().double(), torch.full((4,), math.sqrt(3), dtype=torch.float64))


def test_what_is_not_known_stays_float():
    model = Net(lambda m, x: m.c(m.n(m.b(x).relu()).relu()), b=b(), c=b(), n=nn.GroupNorm(2, 8)).eval()
    made = dfq.compress(model, None, Budget(bits=8), dfq.Config(), torch.Generator())
    assert made.notes["unknown"] == ["c"] and sorted(made.activations) == ["a", "b"]
    network, x = IntegerNetwork(made, model), torch.randn(2, 3, 8, 8)
    assert network.float_nodes == ["n", "c"]
    assert torch.equal(network(x), torch.from_numpy(ReferenceRun(network, x).real("c")))


def test_equalization_stops_at_a_clamp():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    made = dfq.compress(model, None, Budget(bits=8), dfq.Config(), torch.Generator())
    assert made.notes["clamped"] == ["0"]
    step = made.weights["0"].grid.scale
    assert float((made.weights["0"].decode() - model[0].weight).abs().max()) <= 0.5001 * float(step)
    assert float((made.weights["2"].decode() - model[2].weight).abs().max()) > 0.01  # equalized with the last
