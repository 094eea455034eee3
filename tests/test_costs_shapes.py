"""Layer sizes: a network by hand, and the multiply-accumulates of cost.py."""

import pytest
import torch
from torch import nn

from benchmarks import networks
from methods.engine.costs.shapes import LayerShape, leading_padding, origin, shapes_of, sizes_of
from methods.engine.layers import layer_macs


def test_shapes_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 2 * 3, 5))
    conv, linear = shapes_of(model, (4, 7, 7)).values()
    assert conv == LayerShape("0", "conv", 4, 6, 4, 6, 3, 2, 2, (2, 1), (1, 0), 4 * 7 * 7, 6 * 4 * 6)
    assert (conv.positions, conv.reduction, conv.weights, conv.macs) == (24, 2 * 3 * 2, 72, 24 * 72)
    assert linear == LayerShape("4", "linear", 1, 1, 36, 5, in_elements=36, out_elements=5)
    assert linear.macs == linear.weights == 180


@pytest.mark.parametrize("name, shape", [("lenet5_bb", (1, 28, 28)), ("resnet20", (3, 32, 32))])
def test_macs_are_those_of_the_cost_module(name, shape):
    model = networks.build(name, 10, shape[0]).train()
    assert {layer: size.macs for layer, size in shapes_of(model, shape).items()} == layer_macs(model, shape)
    model.train()
    sizes_of(model, shape)
    assert model.training and all(module.training for module in model.modules())


def test_origin():
    graph, sizes = sizes_of(networks.build("resnet18w8", 10, 3), (3, 8, 8))
    assert origin(graph, "layer1.0.relu1") == "layer1.0.conv1"
    assert graph.nodes[origin(graph, "layer1.0.relu2")].op == "add"
    assert origin(graph, graph.nodes["conv1"].inputs[0]) == "x" and sizes["x"] == (3, 8, 8)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("padding", ["valid", "same", 2, (1, 3)])
@pytest.mark.parametrize("kernel, dilation", [((3, 4), (2, 1)), ((2, 5), (1, 2))])
def test_leading_padding(padding, kernel, dilation):
    """A one in the last tap alone meets position o - padding + dilation (kernel - 1)."""
    conv = nn.Conv2d(1, 1, kernel, padding=padding, dilation=dilation, bias=False)
    above, left = leading_padding(conv)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, -1, -1] = 1
        out = conv(torch.arange(400.0).reshape(1, 1, 20, 20))[0, 0]
    row, column = 5 - above + dilation[0] * (kernel[0] - 1), 6 - left + dilation[1] * (kernel[1] - 1)
    assert out[5, 6] == 20 * row + column
