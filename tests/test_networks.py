"""Networks: the numbers the papers print for them, their names, and that the graph sees all of them."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from benchmarks.checkpoints import load_into, read_checkpoint
from benchmarks.data import Dataset, Split, open_dataset, test_batches
from methods.core.errors import ConfigError
from methods.core.graph.build import weight_layers
from methods.core.graph.fold import fold_batchnorm
from methods.core.graph.graph import trace
from methods.core.train.task import top1

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights" / "resnet56_cifar10.npz"
SHAPES = {name: (1, 28, 28) if name.startswith("lenet") else (3, 32, 32) for name in networks.NETWORKS}
SHAPES["resnet18w8"] = (1, 8, 8)


def tiny(height, width, channels):
    """A data set of one image per part."""
    part = Split(torch.zeros(1, height, width, channels, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    return Dataset("tiny", tuple("0123456789"), part, part, part, (0.0,), (1.0,), "")


@pytest.mark.parametrize("name, weights, macs", [
    ("resnet18", 11_164_352, 555_422_720),
    ("resnet20", 9 * 3 * 16 + 6 * 9 * 16**2 + 9 * 16 * 32 + 5 * 9 * 32**2 + 9 * 32 * 64 + 5 * 9 * 64**2
     + 16 * 32 + 32 * 64 + 640, None),
    ("vgg16", 14_710_464 + 5_120, None),
    ("vgg7", None, 615_917_568),
    ("lenet300", 266_200, 266_200),
    ("lenet5_caffe", 430_500, 2_293_000),
    ("lenet5_caffe_relu", 430_500, 2_293_000),
    ("lenet5_bb", 581_408, 4_267_008),
])
def test_published_sizes(name, weights, macs):
    shape = SHAPES[name]
    model = networks.build(name, 10, shape[0]).eval()
    if weights is not None:
        assert sum(layer.weight.numel() for layer in weight_layers(model).values()) == weights
    if macs is not None:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *shape))
        assert counter.get_total_flops() == 2 * macs


def test_layers_of_the_caffe_lenet():
    sizes = {name: layer.weight.numel() for name, layer in weight_layers(networks.build("lenet5_caffe", 10, 1)).items()}
    assert sizes == {"conv1": 500, "conv2": 25_000, "ip1": 400_000, "ip2": 5_000}


@pytest.mark.parametrize("name", SHAPES)
def test_graph_runs_as_the_module(name):
    shape = SHAPES[name]
    model = networks.build(name, 7, shape[0]).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        graph, wanted = trace(model), model(x)
        assert wanted.shape == (3, 7) and torch.equal(graph.run(x), wanted)
        kept = []
        graph.run(x, lambda node, inputs, output: kept.append((output, output.clone())))
        assert all(torch.equal(output, copy) for output, copy in kept)  # nothing is overwritten in place
        folded, topology = fold_batchnorm(model)
        norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        assert len(topology.folded) == len(norms)
        assert torch.allclose(folded(x), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name, inside", [("lenet5_caffe", False), ("lenet5_caffe_relu", True)])
def test_where_the_lenets_rectify(name, inside):
    ops = [node.op for node in trace(networks.build(name, 10, 1))]
    rectified = ["relu"] if inside else []
    conv = ["conv", *rectified, "maxpool"]
    assert ops == ["input", *conv, *conv, "flatten", "linear", "relu", "linear"]


def test_resnet18_is_torchvisions_with_a_small_stem():
    from benchmarks._torchvision import import_datasets

    import_datasets()
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = networks.build("resnet18", 10, 3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_width_of_the_first_stage():
    model = networks.build("resnet18w16", 10, 3)
    widths = [model.get_submodule(name).weight.shape[0] for name in ("conv1", "layer1.0.conv1", "layer4.1.conv2")]
    assert widths == [16, 16, 128]
    wide, full = networks.build("resnet18w64", 10, 3).state_dict(), networks.build("resnet18", 10, 3).state_dict()
    assert all(torch.equal(wide[name], full[name]) for name in full)


def test_seeds_decide_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, two, other = (networks.build("resnet20", 10, 3, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in ("conv1.weight", "fc.weight"))


def test_initial_weights():
    lenet = networks.build("lenet5_caffe", 10, 1)
    for layer, fan_in in ((lenet.conv2, 20 * 25), (lenet.ip1, 800)):
        bound = (3 / fan_in) ** 0.5
        assert 0.99 * bound < float(layer.weight.detach().abs().max()) <= bound and not bool(layer.bias.any())
    conv = networks.build("resnet18w16", 10, 3).layer2[0].conv2
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name, mean, std", [("lenet300", 0, 256 / 255), ("lenet5_caffe", 0, 256 / 255),
                                             ("lenet5_caffe_relu", 0, 1), ("lenet5_bb", 0, 1)])
def test_input_scaling_of_the_papers(name, mean, std):
    assert networks.find(name).scaling == ((mean,), (std,))
    assert networks.find("resnet18").scaling is None


@pytest.mark.parametrize("name", ["resnet19", "resnet18w0", "resnet18w016", "resnet18w", "RESNET18", ""])
def test_unknown_names(name):
    with pytest.raises(ConfigError, match="resnet18wN") as error:
        networks.build(name, 10, 3)
    assert repr(name) in str(error.value) and "lenet5_bb" in str(error.value) and "\n" not in str(error.value)


def test_arguments_out_of_range():
    for arguments, word in ((("resnet20", 1, 3), "classes = 1"), (("resnet20", 10, 0), "channels = 0"),
                            (("lenet300", 10, 3), "takes 1")):
        with pytest.raises(ConfigError, match=word):
            networks.build(*arguments)


def test_what_fits():
    networks.check_fits("lenet300", tiny(28, 28, 1))
    networks.check_fits("vgg7", tiny(32, 32, 3))
    for shape in ((8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 48, 3)):
        networks.check_fits("resnet18w8", tiny(*shape))
    for name, shape in (("lenet5_caffe", (32, 32, 3)), ("vgg16", (8, 8, 1)), ("lenet300", (28, 28, 3))):
        with pytest.raises(ConfigError) as error:
            networks.check_fits(name, tiny(*shape))
        text = str(error.value)
        assert name in text and " x ".join(map(str, shape)) in text and "resnet20" in text and "\n" not in text
    with pytest.raises(ConfigError, match="unknown network"):
        networks.check_fits("alexnet", tiny(32, 32, 3))


def test_published_resnet56():
    folder = os.environ.get("JOINTCOMPRESS_DATA")
    if not WEIGHTS.is_file() or folder is None or not (Path(folder) / "cifar10.npz").is_file():
        pytest.skip("needs cifar10.npz in $JOINTCOMPRESS_DATA and the published ResNet-56")
    model = networks.build("resnet56", 10, 3)
    load_into(model, read_checkpoint(WEIGHTS))
    batches = test_batches(open_dataset("cifar10"), batch_size=500, device="cpu").epoch(None)
    assert 91.0 <= top1(model, [next(batches)]) <= 97.0  # 93.88 % on all 10,000; 500 images stray by up to 3
