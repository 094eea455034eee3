"""Costs: multiply-accumulates against torch's own counter and the definition, bit operations by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from methods.core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Topology,
)
from methods.core.fit.windows import find_window
from methods.core.graph.build import assemble, weight_layers
from methods.engine.costs import hardware_costs
from methods.engine.exact import IntegerNetwork
from methods.engine.layers import LayerCost, layer_costs, layer_macs, totals

ONE = Affine(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))


def channels_of(name):
    return 1 if name.startswith("lenet") else 3


def side_of(name):
    return 28 if name.startswith("lenet") else 32


@pytest.mark.parametrize("name", [*networks.NETWORKS, "resnet18w8"])
def test_macs_are_half_of_torchs_flops(name):
    shape = (channels_of(name), side_of(name), side_of(name))
    model = networks.build(name, 10, channels_of(name)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    macs = layer_macs(model, shape)
    assert 2 * sum(macs.values()) == counter.get_total_flops()
    assert set(macs) == set(weight_layers(model))


def test_macs_by_the_definition():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=1, groups=2), nn.Flatten(), nn.Linear(96, 7))
    macs = layer_macs(model, (4, 8, 6))
    assert macs == {"0": 6 * 4 * 4 * (4 // 2) * 3 * 5, "2": 96 * 7}


def test_resnet18_at_eight_bits():
    """555.42 M multiply-accumulates; 568.75 G, 35.55 G, 17.77 G and 8.89 G bit operations at W32A32 to W4A4."""
    model = networks.build("resnet18", 10, 3).eval()
    edges = {name: ActivationQuantizer(1.0) for name in weight_layers(model)}
    for weight_bits, bits, bops in ((8, 8, 35_547_054_080), (4, 8, 17_773_527_040), (4, 4, 8_886_763_520)):
        weights = {name: CompressedTensor.of(torch.ones(layer.weight.shape, dtype=torch.int32), ONE, weight_bits)
                   for name, layer in weight_layers(model).items()}
        ranges = {name: ActivationQuantizer(1.0, bits=bits) for name in edges}
        found = totals(layer_costs(assemble(model, weights, activations=ranges), model, (3, 32, 32)), 11_164_352)
        assert found["macs"] == 555_422_720 and found["bops"] == found["sparse_bops"] == bops
        assert found["bops_float_activations"] == 555_422_720 * weight_bits * 32
        assert found["weights"] == found["kept_weights"] == 11_164_352
        assert found["density"] == 1 and found["mean_bits"] == weight_bits
    plain = CompressedModel({}, assemble(model, {}).rest)
    assert totals(layer_costs(plain, model, (3, 32, 32)), 11_164_352)["bops"] == 568_752_865_280


@pytest.fixture
def small():
    """Two convs and a linear on a 5 x 5 image: 8 bits and half pruned, a 3-bit codebook, and floats."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten(),
                          nn.Linear(18, 3)).eval()
    with torch.no_grad():
        model[4].weight[0] = 0
    half = torch.arange(72).reshape(4, 2, 3, 3) % 2
    book = Codebook(torch.tensor([0, 0.5, -0.5]))
    weights = {"0": CompressedTensor.of(half, ONE, 8), "2": CompressedTensor.of(torch.ones(2, 4, 1, 1).int(), book, 3)}
    ranges = {"0": ActivationQuantizer(1.0), "2": ActivationQuantizer(1.0, bits=4)}
    return model, assemble(model, weights, activations=ranges)


def test_bit_operations_by_hand(small):
    model, compressed = small
    costs = layer_costs(compressed, model, (2, 5, 5))
    first, second, last = 4 * 9 * 2 * 9, 2 * 9 * 4, 18 * 3
    assert costs == {"0": LayerCost(first, 72, 0.5, 8, 8, 8), "2": LayerCost(second, 8, 1.0, 3, 8, 4),
                     "4": LayerCost(last, 54, pytest.approx(2 / 3), 32, 32, 32)}
    found = totals(costs, 72 + 8 + 54)
    assert found["bops"] == first * 64 + second * 8 * 4 + last * 1024  # the codebook multiplies 8 bits
    assert found["sparse_bops"] == pytest.approx(first * 32 + second * 32 + last * 1024 * 2 / 3)
    assert found["bops_float_activations"] == 32 * (8 * first + 8 * second + 32 * last)


def test_windows_and_layers_in_float_are_counted():
    """A 4-bit window halves the operand of 8-bit codes; what runs in float multiplies 32 x 32, in every count."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(),
                          nn.Linear(36, 3, bias=False)).eval()
    weights = {name: CompressedTensor.of(torch.ones(layer.weight.shape, dtype=torch.int32), ONE, 8)
               for name, layer in weight_layers(model).items()}
    plain = assemble(model, weights, activations=dict.fromkeys(weights, ActivationQuantizer(1.0)))
    windowed = dataclasses.replace(plain, windows={"2": find_window("5opt")})
    first, second, last = 8 * 9, 16 * 9, 108
    for compressed, in_float, wanted in (
            (plain, (), 64 * (first + second + last)), (windowed, (), 64 * (first + last) + 32 * second),
            (windowed, ("0",), 1024 * first + 32 * second + 64 * last),
            (windowed, ("2",), 64 * (first + last) + 1024 * second)):
        assert totals(layer_costs(compressed, model, (2, 3, 3), in_float), 8 + 16 + 108)["bops"] == wanted
        network = IntegerNetwork(compressed, model, in_float)
        assert hardware_costs(compressed, model, (2, 3, 3), network, torch.rand(1, 2, 3, 3))["total"][
            "bb_bops"] == wanted


def test_density_and_mean_bits_by_hand(small):
    model, compressed = small
    found = totals(layer_costs(compressed, model, (2, 5, 5)), 72 + 8 + 54)
    assert found["kept_weights"] == 36 + 8 + 36 and found["weights"] == 134
    assert found["density"] == pytest.approx(80 / 134)
    assert found["mean_bits"] == pytest.approx((36 * 8 + 8 * 3 + 36 * 32) / 80)


def test_removed_channels_are_pruned_weights():
    """Half of the first conv's filters are gone, and with them half of the second's inputs."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    weights = {"0": CompressedTensor.of(torch.ones(2, 1, 1, 1).int(), ONE, 8),
               "2": CompressedTensor.of(torch.ones(2, 2, 1, 1).int(), ONE, 8)}
    compressed = CompressedModel(weights, {}, topology=Topology(widths={"0": (2, 1), "2": (2, 2)}))
    costs = layer_costs(compressed, model, (1, 3, 3))
    assert [cost.macs for cost in costs.values()] == [18, 36] and [c.density for c in costs.values()] == [1, 1]
    found = totals(costs, 12)
    assert found["density"] == 6 / 12 and found["macs"] == 54 and found["kept_weights"] == 6


def test_an_empty_network_has_no_mean():
    weights = {"0": CompressedTensor.of(torch.zeros(2, 1, 1, 1).int(), ONE, 8)}
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    found = totals(layer_costs(CompressedModel(weights, {}), model, (1, 3, 3)), 2)
    assert found["density"] == found["mean_bits"] == found["sparse_bops"] == 0
