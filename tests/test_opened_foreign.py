"""Opened files of networks that are none of this project: transformers, tokens, several outputs, wrapped ones."""

import pytest
import torch
from torch import nn

from methods import Budget, Task, calibrate, encode, open_file
from methods import prune_then_quantize as PQ
from methods.core.errors import CompressError


def generator():
    return torch.Generator().manual_seed(0)


def stored(net, x, path, **config):
    """The file of `net`, quantized to 8 bits on the inputs `x`."""
    compressed = PQ.compress(net, Task.from_inputs(x), Budget(density=1.0, bits=8), PQ.Config(**config), generator())
    encode(compressed, path)
    return path


def test_integers_beyond_a_byte_on_tokens(tmp_path):
    """A linear on [N, T, C] reads its inputs from the last dimension, the repeated ones too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=0.1)
    x = torch.randn(64, 5, 16)
    opened = open_file(stored(net, x, tmp_path / "a.jc", scheme="asymmetric"), net, (5, 16))
    assert max(int(layer.weight.integers.abs().max()) for layer in opened.exact.layers.values()) > 128
    assert torch.equal(opened(x), opened.exact(x))
    assert torch.equal(opened(x[:, 0]), opened.exact(x[:, 0]))


class Remembers(nn.Module):
    """Keeps what it computed last in an attribute, and has a batch norm that is frozen while it trains."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(4, 2)
        self.features = None

    def forward(self, x):
        self.features = self.body(x).mean((2, 3))
        return self.head(self.features)


def frozen():
    torch.manual_seed(0)
    net = Remembers().train()
    net.body[1].eval()
    return net, [module.training for module in net.modules()]


def test_the_network_is_not_modified(tmp_path):
    net, modes = frozen()
    x = torch.randn(8, 3, 6, 6)
    path = stored(net, x, tmp_path / "a.jc")
    for look in (lambda: open_file(path, net, (3, 6, 6)).dense, lambda: open_file(path, net, (3, 6, 6)).hardware(x),
                 lambda: calibrate(net, x), lambda: open_file(path, net, (3, 6, 6)).costs()):
        net.features = None
        look()
        assert net.features is None
        assert [module.training for module in net.modules()] == modes


def test_the_network_is_not_modified_by_an_error():
    net, modes = frozen()
    for inputs in (torch.randn(8, 3, 2, 2), torch.full((8, 3, 6, 6), torch.nan)):
        with pytest.raises((RuntimeError, CompressError)):
            calibrate(net, inputs)
        assert [module.training for module in net.modules()] == modes and net.features is None
