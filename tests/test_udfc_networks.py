"""UDFC on whole networks: the paper's counts, what is refused, and the published checkpoint."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import networks
from benchmarks.checkpoints import load_into, read_checkpoint
from benchmarks.data import open_dataset, test_batches
from methods import neuron_merging, udfc
from methods.core.budget import Budget
from methods.core.errors import BudgetError, CompressError, ConfigError
from methods.core.graph.build import apply, weight_layers
from methods.core.graph.channels import find_pairs
from methods.core.train.task import top1
from methods.udfc import Config

from .test_udfc import X, compress, net

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights" / "resnet56_cifar10.npz"

# --- counts, errors, and what must not happen ----------------------------------------------------------------


@pytest.mark.parametrize("ratio, parameters", [(0.3, 590_180), (0.4, 509_198), (0.5, 430_826)])
def test_parameters_of_resnet56(ratio, parameters):
    """As counted for the Size column of Table 2: 2.36, 2.04, 1.72 MB in float32."""
    model = networks.build("resnet56", 10, 3)
    small = compress(model, Config(reconstruct=False), channel_density=1 - ratio)
    assert sum(v.numel() for name, v in small.rest.items() if "running" not in name) == parameters
    assert apply(small, model).layer3[0].conv1.weight.shape[0] == int(64 * (1 - ratio) + 1e-9)


class PublishedVGG(nn.Module):
    """The VGG-16 of neuron merging: no biases, average pool, two linear layers."""

    def __init__(self):
        super().__init__()
        layers, into = [], 3
        for width in networks.vgg.VGG16_LAYERS:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(into, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                into = width
        self.feature, self.flatten = nn.Sequential(*layers), nn.Flatten()
        self.classifier = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x):
        return self.classifier(self.flatten(self.feature(x)))


def test_parameters_of_the_published_vgg16():
    """The 60 % row: 21.6 MB, widths of neuron merging's code."""
    model = PublishedVGG()
    widths = [32, 64, 128, 128] + [256] * 9
    pairs = find_pairs(model)
    density = {p.first: w / len(model.get_submodule(p.first).weight) for p, w in zip(pairs, widths, strict=True)}
    small = compress(model, Config(reconstruct=False), channel_density=density)
    count = sum(v.numel() for name, v in small.rest.items() if "running" not in name)
    assert count == 5_397_034 and round(4 * count / 1e6, 1) == 21.6
    assert small.topology.widths["classifier.0"] == (512, 256)


def test_size_of_resnet18_on_imagenet():
    """Table 1: 44.59 MiB in float32, 8.36 at 6 bits: every parameter counted, scales not."""
    model = networks.resnet.resnet18(1000, 3, 64)
    count = sum(p.numel() for p in model.parameters()) + 64 * 3 * (7 * 7 - 3 * 3)  # their stem is 7 x 7
    assert [round(count * bits / 8 / 2**20, 2) for bits in (32, 6)] == [44.59, 8.36]


def test_budgets_that_are_refused():
    model = net()
    for budget, word in (({"density": 0.5}, "density"), ({}, "'channel_density' or 'bits'"),
                         ({"channel_density": 0.1}, "leaves no channel of 0"),
                         ({"channel_density": {"3": 0.5}}, "unknown layers"), ({"bits": {"0": 4}}, "leave 3 alone")):
        with pytest.raises(BudgetError, match=word):
            compress(model, **budget)
    with pytest.raises(ConfigError, match="joint = True needs"):
        compress(model, Config(joint=True), channel_density=0.5)
    for options, word in (({"form": "none"}, "form = 'none'"), ({"scheme": "even"}, "scheme = .even.: allowed are odd"),
                          ({"form": "raw", "joint": True}, "joint = True needs form"), ({"alpha1": -1.0}, "alpha1"),
                          ({"alpha2": float("nan")}, "alpha2")):
        with pytest.raises(ConfigError, match=word):
            Config(**options)


def test_networks_that_are_refused():
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
                  nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3))):
        with pytest.raises(CompressError, match="no prunable pair"):
            compress(model, channel_density=0.5)
    broken = net()
    broken[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressError, match="0.weight"):
        compress(broken, channel_density=0.5)


def test_no_data_no_forward_pass_no_randomness(monkeypatch, tiny):
    model = tiny.model()
    before, state = tiny.fingerprint(model), torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    drawn = generator.get_state()

    def fail(*_):
        raise AssertionError("a layer was run")

    for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU):
        monkeypatch.setattr(kind, "forward", fail)
    monkeypatch.setattr(F, "conv2d", fail)
    assert udfc.DATA == "none"
    small = udfc.compress(model, None, Budget(channel_density=0.5, bits=4), Config(), generator)
    assert torch.equal(generator.get_state(), drawn) and torch.equal(torch.get_rng_state(), state)
    assert tiny.same(tiny.fingerprint(model), before) and small.activations == {}
    assert all(value.dtype == torch.float32 for value in small.state_dict().values())


def test_pairs_through_pools_and_blocks(tiny):
    model = tiny.model()
    small = apply(compress(model, channel_density=0.5, bits=4), model)
    assert small.conv3.weight.shape[0] == 6 and small.fc.in_features == 6 and small.conv1.weight.shape[0] == 8
    pooled = net(pool=True)
    assert apply(compress(pooled, channel_density=0.5), pooled)(X.float()).isfinite().all()


def test_on_the_published_checkpoint():
    """Table 2, ResNet-56, 30 %, l2: UDFC above neuron merging above pruning alone; not the printed numbers."""
    folder = os.environ.get("JOINTCOMPRESS_DATA")
    if not WEIGHTS.is_file() or folder is None or not (Path(folder) / "cifar10.npz").is_file():
        pytest.skip("needs cifar10.npz in $JOINTCOMPRESS_DATA and the published ResNet-56")
    model = networks.build("resnet56", 10, 3)
    load_into(model, read_checkpoint(WEIGHTS))
    batch = next(test_batches(open_dataset("cifar10"), batch_size=600, device="cpu").epoch(None))
    budget, generator = Budget(channel_density=0.7), torch.Generator()
    ours, merged, pruned = (top1(apply(method.compress(model, None, budget, config, generator), model), [batch])
                            for method, config in ((udfc, Config(criterion="l2")),
                                                   (neuron_merging, neuron_merging.Config(criterion="l2")),
                                                   (udfc, Config(criterion="l2", reconstruct=False))))
    assert ours > merged > pruned and ours >= 85 and len(weight_layers(model)) == 58
