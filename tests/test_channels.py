"""Removing channels: which pairs may lose some, which channels stay, and what the consumer makes of it."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from methods.core.artifact import Topology
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.graph import channels
from methods.core.graph.build import apply, assemble
from methods.core.graph.channels import Filters, count_channels, find_pairs, keep_channels, merge_channels


def filled(model, seed=0):
    """`model` in eval mode with random batch norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator)
            module.running_var = torch.rand(module.running_var.shape, generator=generator) + 0.1
    return model.eval()


def conv(into, out, size=3, **options):
    return nn.Conv2d(into, out, size, padding=size // 2, **options)


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1, self.bn1, self.relu1 = conv(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv(4, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv3, self.bn3 = conv(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = conv(8, 2)

    def forward(self, x):
        x = self.stem(x)
        y = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.head(x + self.bn3(self.conv3(y)))


def names(model, *kinds):
    return [(pair.first, pair.norm, pair.second, pair.rectified) for pair in find_pairs(model, kinds or (nn.Conv2d,))]


# --- pairs -------------------------------------------------------------------------------------------------


def test_pairs_of_a_basic_block_network():
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert names(networks.build("resnet20", 10, 3)) == [(f"{b}.conv1", f"{b}.bn1", f"{b}.conv2", True) for b in blocks]
    assert len(find_pairs(networks.build("resnet56", 10, 3))) == 27


def test_pairs_of_a_bottleneck():
    assert names(Bottleneck()) == [("conv1", "bn1", "conv2", True), ("conv2", "bn2", "conv3", True)]


def test_pairs_of_plain_networks():
    vgg = names(networks.build("vgg16", 10, 3))
    assert len(vgg) == 13 and vgg[-1] == ("features.40", "features.41", "classifier", True)
    assert [a[2] for a in vgg[:-1]] == [b[0] for b in vgg[1:]]
    vgg7 = networks.build("vgg7", 10, 3)
    assert [pair[0] for pair in names(vgg7)][-1] == "features.17" and len(names(vgg7)) == 6
    assert names(vgg7, nn.Linear) == [("classifier.0", "classifier.1", "classifier.3", True)]
    caffe = [("conv1", None, "conv2", False), ("conv2", None, "ip1", False)]
    assert names(networks.build("lenet5_caffe", 10, 1)) == caffe
    lenet = [("ip1", None, "ip2", True), ("ip2", None, "ip3", True)]
    assert names(networks.build("lenet300", 10, 1), nn.Linear) == lenet


class Twice(nn.Module):
    """The first convolution is read twice and the second is returned."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) + self.c(x)


class Returned(Twice):
    """The output of the first convolution is returned, although another one reads it, too."""

    def forward(self, x):
        x = self.a(x)
        self.b(x)
        return x


@pytest.mark.parametrize("model", [
    Twice(),
    Returned(),
    nn.Sequential(conv(3, 4), nn.ReLU()),
    nn.Sequential(conv(4, 4, groups=4), nn.ReLU(), conv(4, 2)),
    nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=2), nn.ReLU()),
    nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False), conv(4, 2)),
    nn.Sequential(conv(3, 4), nn.ReLU(), nn.BatchNorm2d(4), conv(4, 2)),
    nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 2)),
    nn.Sequential(conv(3, 4), nn.ReLU(), nn.Linear(4, 2)),
], ids=["shared", "read and returned", "returned", "depthwise", "grouped reader", "plain norm", "late norm", "flatten",
        "unflattened"])
def test_no_pair(model):
    assert find_pairs(model) == []
    with pytest.raises(CompressError, match="udfc finds no prunable pair") as error:
        channels.require_pairs(model, "udfc")
    assert "\n" not in str(error.value)


def test_no_layer_is_run(monkeypatch):
    def fail(*_):
        raise AssertionError("a layer was run")

    for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d):
        monkeypatch.setattr(kind, "forward", fail)
    assert len(find_pairs(networks.build("vgg16", 10, 3))) == 13


def test_filters_are_the_layer_in_numbers():
    model = filled(nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 2))).double()
    filters = channels.read_filters(model, find_pairs(model)[0])
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours = nn.functional.conv2d(x, filters.r.reshape(5, 3, 3, 3), filters.k, padding=1)
    with torch.no_grad():
        assert torch.allclose(model[:2](x), ours, rtol=0, atol=1e-12)


# --- which channels stay -----------------------------------------------------------------------------------


def test_counts_are_exact_floors():
    for n in (1, 3, 10, 16, 32, 50, 64, 100, 512):
        for percent in range(0, 100):
            wanted = int(n * (1 - Fraction(percent, 100)))
            if wanted:
                assert count_channels("conv", n, 1 - percent / 100) == wanted
                assert count_channels("conv", n, (100 - percent) / 100) == wanted
    assert count_channels("ip1", 10, 0.37, round) == 4
    with pytest.raises(BudgetError, match="channel_density = 0.05 leaves no channel of conv"):
        count_channels("conv", 16, 0.05)


@pytest.mark.parametrize("criterion", ["l1", "l2", "gm"])
def test_kept_channels(criterion):
    weight = torch.randn(9, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    flat = weight.reshape(9, -1).double().numpy()
    scores = {"l1": [sum(abs(v) for v in row) for row in flat], "l2": [sum(v * v for v in row) for row in flat],
              "gm": [sum(np.sqrt(((a - b) ** 2).sum()) for b in flat) for a in flat]}[criterion]
    for count in range(1, 10):
        best = sorted(sorted(range(9), key=lambda i: scores[i])[-count:])
        assert keep_channels(weight, count, criterion).tolist() == best


def test_ties_and_unknown_criteria():
    assert keep_channels(torch.ones(6, 4), 3, "l1").tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="criterion = 'l3': allowed are l1, l2, gm"):
        keep_channels(torch.ones(6, 4), 3, "l3")


# --- editing -----------------------------------------------------------------------------------------------

NETS = {
    "conv": lambda: nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 4)),
    "flatten": lambda: nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                     nn.Linear(24, 4)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_merging_is_the_mixed_sum(name):
    model, skeleton = filled(NETS[name]()), NETS[name]()
    pair = find_pairs(model, (nn.Conv2d, nn.Linear))[0]
    second = model.get_submodule(pair.second)
    old = second.weight.detach().double().clone()
    state = {key: value.clone() for key, value in model.get_submodule(pair.norm).state_dict().items()}
    kept, z = torch.tensor([0, 2, 5]), torch.randn(3, 6, dtype=torch.float64)
    merge_channels(model, pair, kept, z)
    spread = old.shape[1] // 6
    for a in range(3):
        for column in range(spread):
            wanted = sum(float(z[a, i]) * old[:, i * spread + column] for i in range(6))
            assert torch.allclose(second.weight[:, a * spread + column].double(), wanted, atol=1e-6)
    norm = model.get_submodule(pair.norm)
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, key), state[key][kept])
    widths = channels.changed_widths(model, skeleton)
    assert set(widths) == {pair.first, pair.norm, pair.second} and widths[pair.norm] == (3, 3)
    x = torch.randn(2, 3, 4, 4)
    rebuilt = apply(assemble(model, {}, topology=Topology(widths=widths)), skeleton)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), model(x))


@pytest.mark.parametrize("name", NETS)
def test_plain_pruning_is_a_slice_bit_for_bit(name):
    model = filled(NETS[name]())
    pair = find_pairs(model, (nn.Conv2d, nn.Linear))[0]
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    old, before = second.weight.detach().clone(), first.weight.detach().clone()
    kept = torch.tensor([1, 3, 4])
    merge_channels(model, pair, kept, channels.identity_on(kept, 6))
    spread = old.shape[1] // 6
    columns = torch.cat([torch.arange(int(i) * spread, (int(i) + 1) * spread) for i in kept])
    assert torch.equal(second.weight, old[:, columns]) and torch.equal(first.weight, before[kept])
    assert channels.identity_on(kept, 6)[:, kept].equal(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("weight, ridge", [(0.0, 0.0), (0.5, 0.0), (0.008, 0.01)])
def test_scales_are_one_dimensional_least_squares(weight, ridge):
    generator = torch.Generator().manual_seed(3)
    random = partial(torch.randn, dtype=torch.float64, generator=generator)
    wanted, have = (Filters(random(7, 5), random(7), torch.ones(7)) for _ in range(2))
    for i, ours in enumerate(channels.fit_scales(wanted, have, weight, ridge)):
        matrix = np.concatenate([have.r[i], [weight**0.5 * have.k[i]], [ridge**0.5]])[:, None]
        target = np.concatenate([wanted.r[i], [weight**0.5 * wanted.k[i]], [0.0]])
        assert float(ours) == pytest.approx(max(np.linalg.lstsq(matrix, target, rcond=None)[0][0], 0), abs=1e-12)
    dead = Filters(torch.zeros(1, 5), torch.zeros(1), torch.ones(1))
    assert channels.fit_scales(dead, dead, weight).tolist() == [1.0]


@pytest.mark.parametrize("name", NETS)
def test_scaling_the_norm_equals_scaling_the_next_layer(name):
    ours, theirs = filled(NETS[name]()).double(), filled(NETS[name]()).double()
    theirs.load_state_dict(ours.state_dict())
    pair = find_pairs(ours, (nn.Conv2d, nn.Linear))[0]
    factors = torch.rand(6, dtype=torch.float64) + 0.5
    channels.scale_outputs(ours, pair, factors)
    channels.scale_inputs(theirs.get_submodule(pair.second), torch.diag(factors))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)


