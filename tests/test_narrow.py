"""A network without some of its channels: as if no weight had ever read them."""

import numpy as np
import pytest
import torch
from torch import nn

from methods.core.graph.coupled import find_groups
from methods.core.graph.graph import trace
from methods.core.graph.narrow import Channels, narrowed

from .test_shrink import Dense, Mobile, Residual

READERS = {  # by hand: {network: {first layer of a group: [(layer, the first of its columns that reads it, of each)]}}
    Residual: {"stem": [("a", 0, 1), ("b", 0, 1), ("short", 0, 1)], "b": [("fc", 0, 1)]},
    Mobile: {"body.0": [("body.6", 0, 1)], "body.14": [("body.17", 0, 1)]},
}


def made(kind):
    net = kind()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
    return net.eval()


def kept_of(net, dropped):
    """(channels, bool of what is kept) without the channels {layer: indices of its outputs}."""
    channels = Channels(trace(net))
    kept = np.ones(channels.count, bool)
    for layer, indices in dropped.items():
        kept[channels.rows[layer][indices]] = False
    return channels, kept


@pytest.mark.parametrize("kind", [Residual, Mobile, Dense])
def test_with_all_channels_it_is_the_network_bit_for_bit(kind, tiny):
    net = made(kind)
    before = tiny.fingerprint(net)
    channels, kept = kept_of(net, {})
    same = narrowed(net, channels, kept)
    assert tiny.same(tiny.fingerprint(same), before) and tiny.same(tiny.fingerprint(net), before)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(same.parameters(), net.parameters(), strict=True))
    assert channels.widths(kept) == {}


@pytest.mark.parametrize("kind", READERS)
def test_sums_and_depthwise_convolutions(kind):
    """The same outputs as the whole network whose weights read none of the dropped channels."""
    net, x = made(kind), torch.randn(3, 3, 8, 8)
    dropped = {first: [0, 3, 7] for first in READERS[kind]}
    small = narrowed(net, *kept_of(net, dropped))
    with torch.no_grad():
        for first, readers in READERS[kind].items():
            for name, start, each in readers:
                for channel in dropped[first]:
                    net.get_submodule(name).weight[:, start + each * channel:start + each * (channel + 1)] = 0
        torch.testing.assert_close(small(x), net(x))
    for first, indices in dropped.items():
        assert len(small.get_submodule(first).weight) == len(net.get_submodule(first).weight) - len(indices)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_depthwise_convolution_follows_its_input():
    net = made(Mobile)
    small = narrowed(net, *kept_of(net, {"body.0": [1, 2], "body.6": [0]}))
    assert [small.body[i].weight.shape[0] for i in (0, 3, 6, 8, 10)] == [10, 10, 6, 12, 8]
    assert (small.body[3].groups, small.body[8].groups, small.body[10].groups) == (10, 6, 2)


class Joined(nn.Module):
    """Two branches side by side, then a flatten of 4 pixels for each channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.c, self.fc = nn.Conv2d(9, 6, 1), nn.Linear(24, 2)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.fc(torch.flatten(self.c(x).relu(), 1))


def test_concatenations_and_a_flatten():
    net, x = made(Joined), torch.randn(3, 3, 2, 2)
    small = narrowed(net, *kept_of(net, {"a": [1], "b": [0, 4], "c": [2, 3]}))
    assert [group.size for group in find_groups(trace(net))] == [4, 5, 6]
    with torch.no_grad():
        net.c.weight[:, [1, 4, 8]] = 0
        net.fc.weight[:, 8:16] = 0
        torch.testing.assert_close(small(x), net(x))
    assert small.c.weight.shape == (4, 6, 1, 1) and small.fc.weight.shape == (2, 16)


def test_gradients_reach_the_whole_parameters():
    """Of a cut parameter the gradient of what is kept, and 0 elsewhere."""
    net = made(Joined)
    channels, kept = kept_of(net, {"a": [1]})
    parts = channels.cut(dict(net.named_parameters()), kept)
    assert parts["a.weight"].shape == (3, 3, 1, 1) and parts["c.weight"].shape == (6, 8, 1, 1)
    (parts["a.weight"].sum() + 2 * parts["c.weight"].sum()).backward()
    assert net.a.weight.grad.flatten(1)[:, 0].tolist() == [1, 0, 1, 1]
    assert net.c.weight.grad[0].flatten().tolist() == [2, 0] + [2] * 7


def test_frozen_parameters_stay_frozen():
    net = made(Joined)
    net.a.weight.requires_grad_(False)
    small = narrowed(net, *kept_of(net, {"a": [1]}))
    assert not small.a.weight.requires_grad and small.c.weight.requires_grad
