"""Opened files of networks that are none of this project: transformers, tokens, several outputs, wrapped ones."""

import torch
from torch import nn

from methods import Budget, Task, encode, open_file
from methods import prune_then_quantize as PQ


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
