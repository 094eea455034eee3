"""Bayesian Bits: costs against the authors' inspector, learning rates, ablations and settings."""

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.networks.resnet import resnet18
from methods.bayesian_bits import gate_costs, regulariser, relative_bops
from methods.bayesian_bits.network import GatedNetwork, Point, Wiring, survey

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
CASES = {"lenet5quantized": ("lenet5_bb", (1, 28, 28)), "vggquantized": ("vgg7", (3, 32, 32)),
         "resnet18": ("resnet18", (3, 224, 224))}


def oracle(name):
    path = ORACLES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


@cache
def surveyed(name):
    """(model, points, wiring) of a network of the paper; the ImageNet form of ResNet-18, with residual quantizers."""
    ours, shape = CASES[name]
    if ours == "resnet18":
        model = resnet18(1000, 3, 64)
        model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        model.relu = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    else:
        model = networks.build(ours, 10, shape[0])
    inputs = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return model.eval(), *survey(model.eval(), inputs, residual=ours == "resnet18")


def one_point(kappa=1.0, channels=0, bits=None):
    """A network whose only quantized tensor is the weight of its one layer."""
    points = [Point("0", True, 1.0, True, kappa, channels, bits)]
    wiring = Wiring({"0": 6}, {"0": ("input_1", 1)}, {})
    return GatedNetwork(nn.Sequential(nn.Linear(2, 3)), points, wiring)


def cost(network):
    return regulariser(network, gate_costs(network))


# --- the regulariser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, wanted", [("lenet5quantized", 154.1442), ("vggquantized", 503.3144),
                                          ("resnet18", 1884.887)])
def test_regulariser_at_the_start(name, wanted):
    assert float(cost(GatedNetwork(*surveyed(name))).detach()) == pytest.approx(wanted, abs=1e-3)


def test_regulariser_oracle():
    for row in oracle("bb_regulariser")["rows"]:
        channels = 0 if row["phi2"] is None else len(row["phi2"])
        network = one_point(row["kappa"], channels)
        with torch.no_grad():
            network.phi.copy_(torch.tensor([[row[f"phi{b}"] for b in (4, 8, 16, 32)]]))
            network.phi2.copy_(torch.tensor(row["phi2"] if channels else []))
        value = cost(network)
        value.backward()
        assert float(value.detach()) == pytest.approx(row["reg"], rel=1e-6)
        assert network.phi.grad[0].tolist() == pytest.approx([row[f"dphi{b}"] for b in (4, 8, 16, 32)], rel=1e-4)
        if channels:
            assert network.phi2.grad.tolist() == pytest.approx(row["dphi2"], rel=1e-4)


def test_regulariser_by_hand():
    """A golden row (0.25 kappa, four channels), the values of open patterns, and that channels are averaged."""
    network = one_point(0.25, 4)
    with torch.no_grad():
        network.phi.copy_(torch.tensor([[1.0, 0.5, -0.5, -3.0]]))
        network.phi2.copy_(torch.tensor([6.0, -1.0, 0.5, -6.0]))
        assert float(cost(network)) == pytest.approx(4.1777434, rel=1e-6)
        for fixed, bits in itertools.product((False, True), (2, 4, 8, 16, 32)):  # R3: (2 b - 2) kappa
            network = one_point(0.5, 7, bits if fixed else None)
            network.phi.copy_(torch.tensor([[40.0 if b <= bits else -40.0 for b in (4, 8, 16, 32)]]))
            network.phi2.fill_(40.0)
            assert float(cost(network)) == pytest.approx(0.5 * (2 * bits - 2), rel=1e-6)
            network.phi2[:3] = -40.0
            assert float(cost(network)) == pytest.approx(0.5 * (2 * bits - 2) * 4 / 7, rel=1e-6)


def test_regulariser_grows_with_every_gate():
    network = one_point(0.3, 3)
    with torch.no_grad():
        network.phi.copy_(torch.tensor([[0.5, -1.0, 2.0, 0.0]]))
    cost(network).backward()
    assert (network.phi.grad > 0).all() and (network.phi2.grad > 0).all()


def test_gates_travel_as_long_as_the_note_says():
    """Section 2.7: with nothing but the regulariser and Adam at 1e-2 all gates close after 355 to 375 steps."""
    network = one_point(0.7, 3)
    optimizer = torch.optim.Adam([network.phi, network.phi2], lr=1e-2)
    costs, open_gates = gate_costs(network), {}
    for step in range(1, 376):
        optimizer.zero_grad()
        regulariser(network, costs).backward()
        optimizer.step()
        if step in (355, 375):
            open_gates[step] = network.widths()[0] > 2, bool(network.kept_channels()["0"].any())
    assert open_gates == {355: (True, True), 375: (False, False)}


# --- bit operations and what is quantized ------------------------------------------------------------------


def with_widths(name, weights, activations, half=False):
    """The network's relative BOPs at fixed widths; with `half`, every other channel of each pruned layer is off."""
    model, points, wiring = surveyed(name)
    points = [replace(p, bits=weights if p.weight else activations) for p in points]
    network = GatedNetwork(model, points, wiring)
    if half:
        with torch.no_grad():
            for part in network.per_layer(network.phi2).values():
                part[::2] = -6.0
    return relative_bops(network)


@pytest.mark.parametrize("name, w2, w4, w8, half", [
    ("lenet5quantized", 0.5172, 1.7312, 6.25, 0.517646), ("vggquantized", 0.3974, 1.5715, 6.25, 0.397365),
    ("resnet18", 0.4669, 1.6641, 6.25, 0.633147)])
def test_bit_operations(name, w2, w4, w8, half):
    """B1, B2: the table of section 4, and w4a4 with half of the channels pruned."""
    assert [round(with_widths(name, b, b), 4) for b in (2, 4, 8)] == [w2, w4, w8]
    assert with_widths(name, 4, 4, half=True) == pytest.approx(half, abs=1e-6)


def test_bit_operations_against_the_inspector():
    for name, wanted in oracle("bb_bops").items():
        if name in CASES:
            _, points, wiring = surveyed(name)
            assert sorted(wiring.macs.values()) == sorted(wanted["macs"].values())
            assert with_widths(name, 4, 8) == pytest.approx(wanted["rel"]["w4a8"], rel=1e-12)
            assert with_widths(name, 32, 32) == pytest.approx(wanted["rel"]["w32a32"], rel=1e-12)
            assert len([p for p in points if not p.weight and p.kappa]) == len(wanted["groups"]) - 1


def test_points_of_resnet18():
    """B3 and section 3.2: who is pruned, what an activation costs, and the eleven residual quantizers."""
    model, points, _ = surveyed("resnet18")
    weights, activations = ({p.name: p for p in points if p.weight is kind} for kind in (True, False))
    assert len(weights) == 21 and [name for name, p in weights.items() if p.channels == 0] == ["fc"]
    assert activations["layer1.1.relu2"].kappa == pytest.approx((57_802_752 + 6_422_528) / 118_013_952)
    branches = [p for p in activations.values() if p.kappa is None]
    assert len(branches) == 11 and all(p.signed for p in branches)
    assert len(activations) == 17 + 11 and not any(p.signed for p in activations.values() if p.kappa is not None)
    assert activations["layer4.1.relu2"].kappa == pytest.approx(512_000 / 118_013_952)  # through the average pool
    plain = survey(networks.build("resnet18w2", 10, 3).eval(), torch.randn(2, 3, 8, 8))[0]
    assert len(plain) == 21 + 17
