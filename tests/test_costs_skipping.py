"""Effective multiply-accumulates against a literal convolution that counts them one by one."""

import pytest
import torch
from torch import nn

from benchmarks import networks
from methods.core.artifact import Affine, CompressedTensor
from methods.core.errors import ConfigError
from methods.core.fit.calibrate import calibrate
from methods.core.graph.build import assemble, weight_layers
from methods.engine.costs.skipping import Skips, count_layer, count_network
from methods.engine.exact import IntegerNetwork


def integers(shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 9, shape, generator=generator)
    return values * (torch.rand(shape, generator=generator) < density)


def literal(layer, x, w, lanes):
    """Every multiply-accumulate of a convolution in its own turn."""
    pad_h, pad_w = layer.padding
    images, channels, height, width = x.shape
    x, w = x.tolist(), w.tolist()
    out_h = (height + 2 * pad_h - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1) // layer.stride[0] + 1
    out_w = (width + 2 * pad_w - layer.dilation[1] * (layer.kernel_size[1] - 1) - 1) // layer.stride[1] + 1
    macs = activations = weights = both = lane_steps = dense_steps = 0
    for image in range(images):
        done, dense = [0] * len(w), [0] * len(w)
        for k in range(len(w)):
            first = k // (len(w) // layer.groups) * (channels // layer.groups)
            for oh in range(out_h):
                for ow in range(out_w):
                    for c in range(channels // layer.groups):
                        for r in range(layer.kernel_size[0]):
                            for s in range(layer.kernel_size[1]):
                                h = oh * layer.stride[0] - pad_h + r * layer.dilation[0]
                                v = ow * layer.stride[1] - pad_w + s * layer.dilation[1]
                                inside = 0 <= h < height and 0 <= v < width
                                a = inside and x[image][first + c][h][v] != 0
                                b = w[k][c][r][s] != 0
                                dense[k] += 1
                                done[k] += a and b
                                activations += a
                                weights += b
        macs, both = macs + sum(dense), both + sum(done)
        for start in range(0, len(w), lanes):
            lane_steps += max(done[start:start + lanes])
            dense_steps += max(dense[start:start + lanes])
    return Skips(macs, activations, weights, both, lane_steps, dense_steps)


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2}, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": 1, "groups": 2}, {"kernel_size": 3, "groups": 4, "padding": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 5, "stride": 3}])
@pytest.mark.parametrize("lanes", [1, 3, 100])
def test_against_a_literal_convolution(options, lanes):
    layer = nn.Conv2d(4, 8, bias=False, **options)
    x, w = integers((2, 4, 6, 7), 0.4, 1), integers(layer.weight.shape, 0.3, 2)
    size = tuple(layer(x.float()).shape[2:])
    assert count_layer(layer, x, w, size, lanes) == literal(layer, x, w, lanes)


def test_same_padding_that_is_longer_below():
    layer = nn.Conv2d(1, 1, 2, padding="same", bias=False)  # one row below, one column to the right
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0, 0] = 5
    assert count_layer(layer, x, torch.ones(1, 1, 2, 2), (3, 3)) == Skips(36, 1, 36, 1, 1, 36)
    x[0, 0, 2, 2] = -5
    assert count_layer(layer, x, torch.ones(1, 1, 2, 2), (3, 3)).both == 1 + 4


def test_linear_by_hand():
    layer = nn.Linear(4, 3)
    x, w = torch.tensor([[0, 1, 2, 0], [3, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    # image 1: 1, 2, 0; image 2: 1, 0, 0; lanes of two filters: max(1, 2) + 0 + max(1, 0) + 0
    assert count_layer(layer, x, w, (), 2) == Skips(24, 9, 10, 4, 3, 2 * 2 * 4)


def test_nothing_is_skipped_where_nothing_is_zero():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    skips = count_layer(layer, torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3), (3, 3), 2)
    assert skips == Skips(*[2 * 9 * 4 * 27] * 4, *[2 * 2 * 9 * 27] * 2)


def test_what_is_not_allowed():
    circular = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    one = torch.ones(1, 1, 3, 3)
    for make in (lambda: count_layer(circular, one, one, (3, 3)), lambda: count_layer(nn.ReLU(), one, one, (3, 3)),
                 lambda: count_layer(nn.Linear(3, 1), torch.ones(1, 2, 3), torch.ones(1, 3), ())):
        with pytest.raises(ConfigError, match="Conv2d that pads with zeros"):
            make()
    with pytest.raises(ConfigError, match="lanes = 0"):
        count_layer(nn.Linear(1, 1), torch.ones(1, 1), torch.ones(1, 1), (), 0)


def quantized(name, shape):
    """An IntegerNetwork of 5-bit weights, half of them pruned, on inputs whose zero point is not 0."""
    model = networks.build(name, 4, shape[0])
    weights = {}
    for i, (layer, module) in enumerate(weight_layers(model).items()):
        codes = integers(module.weight.shape, 0.5, i).to(torch.int32) - 1
        codes = torch.where(integers(codes.shape, 0.5, 99) == 0, codes, -2 - codes)  # value x -1
        grid = Affine(torch.tensor(0.01), torch.tensor(-1, dtype=torch.int32))
        weights[layer] = CompressedTensor.of(codes, grid, 5)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    compressed = assemble(model, weights, activations=calibrate(model, x))
    return compressed, model, IntegerNetwork(compressed, model), x


def test_counting_a_network():
    _, _, network, x = quantized("resnet18w8", (3, 8, 8))
    seen = {}
    network.see = lambda layer, codes, total: seen.update({layer.node.name: (layer, codes, total)})
    network(x)
    before = network.see
    counts = count_network(network, [x[:1], x[1:]], lanes=4)
    assert network.see is before and list(counts) == list(network.layers)
    for name in ("conv1", "layer2.0.downsample.0", "layer2.0.conv1"):
        layer, codes, _ = seen[name]
        wanted = literal(layer.node.module, codes - layer.source.zero, layer.weight.integers, 4)
        assert counts[name] == wanted and 0 < wanted.both < wanted.weights
    assert seen["conv1"][0].source.zero != 0


def test_layers_in_float_are_left_out_and_the_hook_comes_back():
    compressed, model, _, x = quantized("lenet5_bb", (1, 28, 28))
    network = IntegerNetwork(compressed, model, ("conv1",))
    assert list(count_network(network, [x])) == ["conv2", "ip1", "ip2"] and network.see is None
    with pytest.raises(RuntimeError):
        count_network(network, [x[:, :, :5]])
    assert network.see is None
