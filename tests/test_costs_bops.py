"""Bit operations: the official inspector's numbers for three networks, and both forms by hand."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.networks.resnet import resnet18
from methods.core.errors import ConfigError
from methods.engine.costs.bops import Operands, activation_width, bayesian_bits, feeders, kept_filters, relative, uniq
from methods.engine.costs.shapes import LayerShape, layer_shapes, sizes_of

ORACLE = Path(__file__).parents[2] / "shared" / "oracles" / "bb_bops.json"
NETWORKS = {"lenet5quantized": ("lenet5_bb", (1, 28, 28)), "vggquantized": ("vgg7", (3, 32, 32)), "resnet18": None}
WIDTHS = {"w2a2": (2, 2), "w2a4": (2, 4), "w4a4": (4, 4), "w8a8": (8, 8), "w16a16": (16, 16), "w32a32": (32, 32),
          "w4a8": (4, 8)}


def resnet18_imagenet():
    model = resnet18(1000, 3, 64)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    model.relu = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return model


@cache
def traced(name):
    """(graph, {layer: LayerShape}, feeders) of a network of the oracle."""
    if name == "resnet18":
        model, shape = resnet18_imagenet(), (3, 224, 224)
    else:
        ours, shape = NETWORKS[name]
        model = networks.build(ours, 10, shape[0])
    graph, sizes = sizes_of(model, shape)
    return graph, layer_shapes(graph, sizes), feeders(model)


def percent(name, weight_bits, activation_bits, kept=1.0, ends=None):
    """Relative BOPs at one width; `kept` of the filters of all layers but the last; `ends` bits of the first and
    last layer's weights and of the last layer's input."""
    graph, shapes, feeding = traced(name)
    layers = list(shapes)
    operands = {layer: Operands(weight_bits, activation_bits, kept) for layer in layers}
    operands[layers[-1]] = Operands(ends or weight_bits, ends or activation_bits)
    if ends is not None:
        operands[layers[0]] = Operands(ends, ends)
    return relative(bayesian_bits(graph, shapes, operands, feeding), shapes)


@pytest.mark.parametrize("name, macs, largest", [
    ("lenet5quantized", 4_267_008, 3_276_800), ("vggquantized", 615_917_568, 150_994_944),
    ("resnet18", 1_814_073_344, 118_013_952)])
def test_macs(name, macs, largest):
    shapes = traced(name)[1].values()
    assert sum(shape.macs for shape in shapes) == macs and max(shape.macs for shape in shapes) == largest


@pytest.mark.parametrize("name, w2, w4, w8, w2_ends, w3_ends, w4_ends", [
    ("lenet5quantized", 0.5172, 1.7312, 6.25, 1.0304, 1.4654, 2.0743),
    ("vggquantized", 0.3974, 1.5715, 6.25, 0.4244, 0.9099, 1.5895),
    ("resnet18", 0.4669, 1.6641, 6.25, 0.7735, 1.2298, 1.8688)])
def test_table_of_section_4(name, w2, w4, w8, w2_ends, w3_ends, w4_ends):
    assert [round(percent(name, bits, bits), 4) for bits in (2, 4, 8)] == [w2, w4, w8]
    assert [round(percent(name, bits, bits, ends=8), 4) for bits in (2, 3, 4)] == [w2_ends, w3_ends, w4_ends]


@pytest.mark.parametrize("name, wanted", [("lenet5quantized", 0.517646), ("vggquantized", 0.397365),
                                          ("resnet18", 0.633147)])
def test_half_of_the_filters_pruned(name, wanted):
    assert round(percent(name, 4, 4, kept=0.5), 6) == wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_against_the_official_inspector(name):
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not there")
    wanted = json.loads(ORACLE.read_text())[name]
    # ours runs a block's shortcut before its convolutions, the official table lists it after them
    assert sorted(shape.macs for shape in traced(name)[1].values()) == sorted(wanted["macs"].values())
    for key, (weight_bits, activation_bits) in WIDTHS.items():
        assert percent(name, weight_bits, activation_bits) == pytest.approx(wanted["rel"][key], rel=1e-12)
    assert percent(name, 4, 4, kept=0.5) == pytest.approx(wanted["half_pruned_w4a4"], rel=1e-7)


def test_who_feeds_whom():
    assert traced("resnet18")[2] == {f"layer{stage}.{block}.conv2": f"layer{stage}.{block}.conv1"
                                     for stage in (1, 2, 3, 4) for block in (0, 1)}
    assert traced("lenet5quantized")[2] == {"conv2": "conv1", "ip1": "conv2", "ip2": "ip1"}


def test_by_hand():
    """MACs x bits x 8 x p_out for the first, x p_in = p_out of the first for the second; groups have no p_in."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    graph, sizes = sizes_of(model, (1, 3, 3))
    operands = {"0": Operands(4, 16, 0.75), "2": Operands(2, 3, 0.5)}
    assert bayesian_bits(graph, layer_shapes(graph, sizes), operands, feeders(model)) == {
        "0": 36 * 4 * 8 * 0.75, "2": 72 * 2 * 3 * 0.5 * 0.75}
    assert activation_width(graph, "0", operands["0"]) == 8 and activation_width(graph, "2", operands["2"]) == 3
    in_float = {"0": Operands(32, 32, 0.75, in_float=True), "2": operands["2"]}
    assert bayesian_bits(graph, layer_shapes(graph, sizes), in_float, {})["0"] == 36 * 32 * 32 * 0.75
    depthwise = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=4, bias=False))
    graph, sizes = sizes_of(depthwise, (1, 3, 3))
    operands = {"0": Operands(4, 8, 0.5), "1": Operands(2, 3, 0.5)}
    assert bayesian_bits(graph, layer_shapes(graph, sizes), operands, feeders(depthwise))["1"] == 36 * 2 * 3 * 0.5


def test_a_pruned_filter_keeps_nothing():
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    mask[0], mask[2, 1, 2, 2] = True, True
    assert kept_filters(mask) == 0.5 and kept_filters(mask[:, 0, 0, 0][:, None]) == 0.25


def test_uniq_by_hand():
    layer = LayerShape("layer", "conv", 2, 2, 8, 3, 1, 2, groups=2)  # 8 products a sum, 4 * 3 * 8 MACs
    assert uniq(layer, 4, 8) == 96 * (32 + 4 + 8 + 3) and uniq(layer, 4, 8, 0.25) == 96 * (8 + 4 + 8 + 3)
    with pytest.raises(ConfigError, match="density = 1.5"):
        uniq(layer, 4, 8, 1.5)


def test_stored_totals_of_resnet18_on_cifar():
    graph, sizes = sizes_of(networks.build("resnet18", 10, 3), (3, 32, 32))
    shapes = layer_shapes(graph, sizes)

    def giga(values):
        return sum(values) / 1e9

    for weight_bits, activation_bits, wanted in ((8, 8, 35.55), (4, 8, 17.77)):
        operands = dict.fromkeys(shapes, Operands(weight_bits, activation_bits))
        assert round(giga(bayesian_bits(graph, shapes, operands, {}).values()), 2) == wanted
    assert round(giga(uniq(shape, 8, 8) for shape in shapes.values()), 1) == 50.2
    assert round(giga(uniq(shape, 8, 8, 0.1) for shape in shapes.values()), 1) == 18.2
    assert math.isclose(giga(shape.macs * 32 * 32 for shape in shapes.values()), 568.75, abs_tol=0.005)
