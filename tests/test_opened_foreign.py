"""Opened files of networks that are none of this project: transformers, tokens, several outputs, wrapped ones."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from methods import Budget, Task, apply, calibrate, decode, encode, open_file
from methods import prune_then_quantize as PQ
from methods.core.errors import CompressError, ConfigError, GraphError
from methods.engine import verify


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


class Tokens(nn.Module):
    """Reads whole numbers; with positions, only so many."""

    def __init__(self):
        super().__init__()
        self.words, self.position, self.head = nn.Embedding(20, 8), nn.Parameter(torch.zeros(5, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.words(x) + self.position)


def test_costs_of_a_network_that_reads_tokens(tmp_path):
    torch.manual_seed(0)
    net, x = Tokens(), torch.randint(0, 20, (16, 5))
    opened = open_file(stored(net, x, tmp_path / "a.jc"), net, (5,))
    assert opened.costs()["head"].macs == 5 * 8 * 3 == opened.dense.macs["head"]
    assert opened.hardware()["total"]["macs"] == 120
    with pytest.raises(ConfigError, match=r"^shape = \(6,\): Tokens cannot take one input of that shape: ") as raised:
        open_file(tmp_path / "a.jc", net, (6,)).hardware()
    assert "\n" not in str(raised.value) and "size of tensor" in str(raised.value)
    assert torch.equal(opened(x), opened.exact(x)) and opened.verify([(x, None)], 16, 4).wrong_outputs == 0


class Several(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.body, self.left, self.right, self.pack = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3), pack

    def forward(self, x):
        x = self.body(x).relu()
        return self.pack(self.left(x), self.right(x))


@pytest.mark.parametrize("pack", [lambda a, b: (a, b), lambda a, b: {"a": a, "more": [b, None]}])
def test_networks_with_several_outputs(pack, tmp_path):
    torch.manual_seed(0)
    net, x = Several(pack), torch.randn(16, 6)
    opened = open_file(stored(net, x, tmp_path / "a.jc"), net, (6,))
    assert {name: cost.macs for name, cost in opened.costs().items()} == {"body": 48, "left": 16, "right": 24}
    assert opened.hardware(x)["total"]["dense_macs"] == 88
    verdict = opened.verify([(x, None)], 16, 4)
    assert verdict.codes > 0 and verdict.reference_codes > 0
    assert verdict.wrong == verdict.wrong_outputs == verdict.reference_wrong == 0


def test_each_of_several_outputs_is_compared(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, x = Several(lambda a, b: (a, b)), torch.randn(16, 6)
    opened = open_file(stored(net, x, tmp_path / "a.jc"), net, (6,))
    opened.fast.unsupported = ""
    monkeypatch.setattr(type(opened.fast), "__call__", lambda fast, x: tuple(y + 1 for y in fast.exact(x)))
    monkeypatch.setattr(verify, "recorded", lambda network, x: (network(x), {}))
    assert opened.verify([(x, None)], 16).wrong_outputs == 16 * 5


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_networks(wrap, tmp_path):
    net, x = body(), torch.randn(8, 3, 6, 6)
    path = stored(net, x, tmp_path / "a.jc")
    opened, want = open_file(path, wrap(net), (3, 6, 6)), open_file(path, net, (3, 6, 6))
    assert opened.dense.macs == want.dense.macs and opened.costs() == want.costs()
    assert opened.hardware(x) == want.hardware(x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


@pytest.mark.parametrize("make, reason", [
    (Untraceable, "torch.fx cannot look into the network: .*Untraceable has none$"),
    (lambda: nn.Linear(6, 4), "inside a network: Linear has none$")])
def test_hardware_needs_layers_that_the_graph_shows(make, reason, tmp_path):
    torch.manual_seed(0)
    net, x = make(), torch.randn(8, 6)
    opened = open_file(stored(net, x, tmp_path / "a.jc"), net, (6,))
    with pytest.raises(ConfigError, match=f"^hardware costs are those of convs and linears.*{reason}"):
        opened.hardware()


@pytest.mark.parametrize("ask", [lambda opened: opened.costs(), lambda opened: opened.hardware(),
                                 lambda opened: opened.dense, lambda opened: opened.traced])
def test_costs_without_a_shape_or_with_a_wrong_one(ask, tmp_path):
    net, x = body(), torch.randn(8, 3, 6, 6)
    path = stored(net, x, tmp_path / "a.jc")
    with pytest.raises(ConfigError, match=r"^shape = \(\): costs need that of one input"):
        ask(open_file(path, net))
    for wrong in ((3, 8, 8), (3, 2, 2)):
        with pytest.raises(ConfigError, match=rf"^shape = \({wrong[0]}, .*Sequential cannot take one input") as raised:
            ask(open_file(path, net, wrong))
        assert "\n" not in str(raised.value)


def test_hardware_refuses_a_sample_in_one_line(tmp_path):
    net, x = body(), torch.randn(8, 3, 6, 6)
    opened = open_file(stored(net, x, tmp_path / "a.jc"), net, (3, 6, 6))
    with pytest.raises(ConfigError, match="^Sequential cannot take inputs float32 .8, 3, 5, 5.: "):
        opened.hardware(x[:, :, 1:, 1:])


def test_a_file_without_ranges_says_how_to_get_them(tmp_path):
    """And what it says is done here."""
    network, inputs = body(), torch.randn(8, 3, 6, 6)
    encode(dataclasses.replace(decode(stored(network, inputs, tmp_path / "a.jc")), activations={}), tmp_path / "a.jc")
    told = r"^the input of 0 has no activation quantizer: calibrate, and encode (.*) of c = decode.path.$"
    with pytest.raises(GraphError, match=told) as raised:
        open_file(tmp_path / "a.jc", network, (3, 6, 6))(inputs)
    names = {"dataclasses": dataclasses, "calibrate": calibrate, "apply": apply, "network": network, "x": inputs}
    encode(eval(re.match(told, str(raised.value))[1], names | {"c": decode(tmp_path / "a.jc")}), tmp_path / "b.jc")
    opened = open_file(tmp_path / "b.jc", network, (3, 6, 6))
    assert torch.equal(opened(inputs), opened.exact(inputs)) and not opened.exact.float_nodes
