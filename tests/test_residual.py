"""Residual blocks that are gone: which can go, what is left of the network, and every reader of its file."""

import subprocess
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.core.artifact import CompressedModel, Topology
from methods.core.errors import CompressError
from methods.core.file.storage import decode, encode, from_bytes, inspect, load, to_bytes
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble
from methods.core.graph.fold import fold_batchnorm
from methods.core.graph.residual import find_blocks
from methods.core.graph.shrink import shrink
from methods.core.graph.weights import weight_layers
from methods.engine.exact import IntegerNetwork
from methods.engine.export import to_c_header
from methods.engine.opened import Opened

SHAPE = (3, 6, 6)


class Block(nn.Module):
    """x + branch, and a ReLU behind."""

    def __init__(self, into, out=None):
        super().__init__()
        out = into if out is None else out
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def network(*left_out):
    """Of four blocks "a" to "d", the third with a projection; without the blocks in `left_out`."""
    torch.manual_seed(5)
    layers = OrderedDict(stem=nn.Conv2d(3, 6, 3), relu=nn.ReLU(), a=Block(6), b=Block(6), c=Block(6, 8), d=Block(8),
                         pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 4))
    for module in nn.Sequential(layers).modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if name not in left_out)).eval()


def pictures(n=5):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def compressed_without(*blocks, bits=6):
    """8-bit activations, folded batch norms, symmetric weights, from the network that never had the blocks."""
    folded, topology = fold_batchnorm(network(*blocks))
    weights = {name: quantize(layer.weight.detach(), fit_symmetric(layer.weight.detach(), bits), bits)
               for name, layer in weight_layers(folded).items()}
    made = assemble(folded, weights, topology=replace(topology, removed=blocks))
    return replace(made, activations=calibrate(apply(replace(made, topology=topology), network(*blocks)), pictures()))


# --- which blocks can go -----------------------------------------------------------------------------------


class Made(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.inner = nn.ModuleDict(layers)
        self.rule = forward

    def forward(self, x):
        return self.rule(self.inner, x)


class Several(nn.Linear):
    def forward(self, x, y):
        return x + super().forward(y)


def of_linear(rule, **more):
    return Made(rule, f=nn.Linear(4, 4), **more)


@pytest.mark.parametrize("name, block, found", [(name, *rest) for name, rest in {
    "sum": (of_linear(lambda m, x: x + m.f(x)), True),
    "in place": (of_linear(lambda m, x: m.f(x).add_(x).relu_()), True),
    "two sums": (of_linear(lambda m, x: (x + m.f(x)) + torch.tanh(m.f(x))), True),
    "a ReLU6 behind": (of_linear(lambda m, x: nn.functional.relu6(x + m.f(x))), True),
    "a ReLU on the shortcut": (of_linear(lambda m, x: torch.relu(x) + m.f(x)), True),
    "dropout": (of_linear(lambda m, x: x + m.d(m.f(x)), d=nn.Dropout(0.5)), True),
    "no sum": (of_linear(lambda m, x: m.f(torch.relu(x))), False),
    "idle weights": (of_linear(lambda m, x: torch.relu(x)), False),
    "no weights": (Made(lambda m, x: x + torch.relu(x)), False),
    "a projection": (of_linear(lambda m, x: m.g(x) + m.f(x), g=nn.Linear(4, 4)), False),
    "a scaled shortcut": (of_linear(lambda m, x: 2 * x + m.f(x)), False),
    "a layer behind": (of_linear(lambda m, x: m.g(x + m.f(x)), g=nn.Linear(4, 4)), False),
    "tanh behind": (of_linear(lambda m, x: torch.tanh(x + m.f(x))), False),
    "a clamp below 0": (of_linear(lambda m, x: torch.clamp(x + m.f(x), -1, 1)), False),
    "joined": (of_linear(lambda m, x: torch.cat([x, m.f(x)], 1)), False),
    "several inputs": (Several(4, 4), False),
}.items()])
def test_a_block_adds_to_what_it_takes(name, block, found):
    assert find_blocks(nn.Sequential(nn.ReLU(), block)) == (["1"] if found else []), name


def test_blocks_of_a_network():
    assert find_blocks(network()) == ["a", "b", "d"]
    nested = of_linear(lambda m, x: x + m.block(m.f(x)), block=of_linear(lambda m, x: x + m.f(x)))
    assert find_blocks(nn.Sequential(nested)) == ["0.inner.block"]
    one = Block(6)
    assert find_blocks(nn.Sequential(one, Block(6), one)) == ["1"]
    shared, other = Block(6), Block(6)
    other.conv2 = shared.conv2
    assert find_blocks(nn.Sequential(shared, other)) == []
    relu = nn.ReLU()
    assert find_blocks(nn.Sequential(*(of_linear(lambda m, x: m.r(x + m.f(x)), r=relu) for _ in "ab"))) == ["0", "1"]


# --- what is left ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_is_the_one_without_the_blocks_bit_for_bit():
    small = compressed_without("b", "d")
    back, skeleton = from_bytes(to_bytes(small)[0]), network()
    assert back.topology.removed == ("b", "d") and set(back.topology.folded) == {"a.conv1", "a.conv2", "c.conv1",
                                                                                 "c.conv2"}
    plain = replace(back, topology=replace(back.topology, removed=()))
    one, other = apply(back, skeleton), apply(plain, network("b", "d"))
    assert torch.equal(one(pictures()), other(pictures())) and isinstance(one.b, nn.Identity)
    integer = IntegerNetwork(back, skeleton)
    assert torch.equal(integer(pictures()), IntegerNetwork(plain, network("b", "d"))(pictures()))
    assert isinstance(skeleton.b, Block)


@torch.no_grad()
def test_a_block_that_adds_nothing_is_the_identity_bit_for_bit():
    dead, skeleton = network(), network()
    for block in (dead.b, dead.d):
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    whole = assemble(dead, {})
    rest = {name: value for name, value in whole.rest.items() if name.split(".")[0] not in ("b", "d")}
    gone = CompressedModel({}, rest, topology=Topology(removed=("b", "d")))
    assert torch.equal(apply(gone, skeleton)(pictures()), apply(whole, skeleton)(pictures()))
    assert len(to_bytes(gone)[0]) < len(to_bytes(whole)[0])


def test_costs_are_those_of_what_is_left():
    opened = Opened(compressed_without("b"), network(), SHAPE)
    whole = {name: layer for name, layer in opened.dense.macs.items()}
    left = {name: macs for name, macs in whole.items() if not name.startswith("b.")}
    assert opened.traced.macs == left and set(opened.costs()) == set(left)
    hardware = opened.hardware(pictures())
    assert set(hardware["layers"]) >= set(left) and not any(name.startswith("b.") for name in hardware["layers"])
    assert hardware["total"]["dense_macs"] == sum(whole.values()) > hardware["total"]["macs"] == sum(left.values())
    full = Opened(compressed_without(), network(), SHAPE).hardware()["total"]
    for cost in ("cycles", "energy_ratio", "traffic_bits_smallest", "bb_bops_percent"):
        assert hardware["total"][cost] < full[cost], cost


def test_every_reader_of_the_file(tmp_path):
    made, path = compressed_without("a", "d"), tmp_path / "net.jc"
    encode(made, path)
    assert inspect(path)["removed"] == ["a", "d"] and inspect(path)["version"] == 3
    x, opened = pictures(), Opened(decode(path), network(), SHAPE)
    with torch.no_grad():
        assert torch.equal(load(path, network())(x), opened.module(x))
        assert torch.equal(opened(x), opened.exact(x))
    assert opened.verify([(x, torch.zeros(len(x)))], len(x), 1).reference_wrong == 0
    small = shrink(made, network())
    assert small.topology.removed == ("a", "d")
    with torch.no_grad():
        assert torch.allclose(apply(small, network())(x), opened.module(x), atol=1e-5)
    to_c_header(made, network(), tmp_path / "net.h")
    text = (tmp_path / "net.h").read_text()
    assert "c_conv1" in text and "a_conv1" not in text
    subprocess.run(["cc", "-fsyntax-only", "-xc", tmp_path / "net.h"], check=True)


def test_onnx_has_no_node_of_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    opened = Opened(compressed_without("a", "d"), network(), SHAPE)
    opened.to_onnx(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: pictures().numpy()})[0]
    assert (torch.from_numpy(found).argmax(1) == opened(pictures()).argmax(1)).all()


# --- files that are wrong ----------------------------------------------------------------------------------


def test_only_a_file_that_needs_it_is_of_version_3():
    assert to_bytes(compressed_without())[0][4] == 2 and to_bytes(compressed_without("b"))[0][4] == 3


@pytest.mark.parametrize("path, message", [
    ("e", "the network has no layer 'e'"), ("b.conv9", "no layer 'b.conv9'"), ("c", "c cannot be removed: it is no"),
    ("relu", "relu cannot be removed"), ("", "the network cannot be removed")])
def test_a_path_that_is_no_block_of_the_network_is_refused_in_one_line(path, message):
    made = compressed_without("b")
    wrong = replace(made, topology=replace(made.topology, removed=("b", path)))
    with pytest.raises(CompressError, match=message) as caught:
        apply(wrong, network())
    assert "\n" not in str(caught.value)
    with pytest.raises(CompressError, match="lacks"):
        apply(replace(made, topology=replace(made.topology, removed=())), network())
    with pytest.raises(CompressError, match="no layer 'b.conv1'"):
        apply(compressed_without(), network("b"))
