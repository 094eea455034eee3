"""The papers' ImageNet tables: every row is well-formed and fits its network; cheap ones run at full resolution."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import networks
from benchmarks.__main__ import main
from benchmarks.execute import check_layers
from benchmarks.jobs import CONFIGS, prepare, read_table
from benchmarks.rows import read_rows
from methods.core.graph.build import weight_layers

FILES = sorted(CONFIGS.glob("imagenet_*.toml"))
CHEAP = [("imagenet_udfc_table1", "UDFC 6/6"), ("imagenet_sparq", "5opt round")]


@functools.cache
def layers_of(network):
    """Shapes of the weight layers of a network for 1,000 classes, without the memory of its weights."""
    with torch.device("meta"):
        return {name: layer.weight.shape for name, layer in weight_layers(
            networks.find(network).make(1000, 3)).items()}


def test_every_paper_has_its_tables():
    assert [path.stem.removeprefix("imagenet_") for path in FILES] == [
        "admm", "annc", "bayesian_bits", "clip_q", "deep_compression", "sparq", "udfc_table1", "udfc_table3"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_are_well_formed_and_name_layers_of_their_network(path):
    lines = path.read_text().splitlines()
    assert any(line.startswith("# Not run here: ") for line in lines[:6])
    assert all(len(line) <= 120 for line in lines if line.startswith("#"))
    table = read_table(path)
    assert table.rows and not table.compare
    for job in table.rows:
        method, budget, _ = prepare(job)
        assert job.task == "imagenet" and job.network.startswith(networks.TORCHVISION)
        layers = layers_of(job.network)
        check_layers(job, list(layers))
        named = [table for table in (budget.density, budget.bits, job.paper.get("layers")) if isinstance(table, dict)]
        assert all(set(table) == set(layers) for table in named), job.name


def test_densities_of_deep_compression_add_up_to_the_printed_rate():
    """VGG-16 has the paper's layers: what it keeps of each is the total that is printed, 7.5 %, up to the rounding."""
    (vgg,) = [job for job in read_table(CONFIGS / "imagenet_deep_compression.toml").rows if "vgg" in job.network]
    sizes = {name: shape.numel() for name, shape in layers_of(vgg.network).items()}
    kept = sum(size * vgg.budget["density"][name] for name, size in sizes.items())
    assert sum(sizes.values()) == 138_344_128 and kept / sum(sizes.values()) == pytest.approx(0.075, abs=0.005)


def test_codes_of_admm_come_to_the_printed_ratio():
    """The authors' network kept these weights of each layer; at the widths of the row they are the printed 210x."""
    kept = dict(zip(layers_of("torchvision:alexnet"), (28_227, 61_440, 168_100, 132_711, 88_474, 754_976, 905_970,
                                                       327_680), strict=True))
    (job,) = [job for job in read_table(CONFIGS / "imagenet_admm.toml").rows if job.name == "210x"]
    bits = sum(count * job.budget["bits"][name] for name, count in kept.items())
    assert 32 * 60_954_656 / bits == pytest.approx(job.paper["accounting.ratios.data_only"], abs=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data directory whose imagenet/ has two classes of a few noisy pictures, and weights of a ResNet-18 for it."""
    root, drawn = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537")):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = (120 * label + drawn.integers(0, 120, (375, 500, 3))).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{name}_{i}.JPEG")
    torch.save(networks.build("torchvision:resnet18", 2, 3).state_dict(), root / "resnet18.pth")
    return root


def test_a_baseline_and_a_method_train_on_random_crops(place, tmp_path, capsys):
    assert main(["compress", "prune_then_quantize", "--task", f"imagenet:{place / 'imagenet'}", "--image-size", "32",
                 "--network", "resnet18w2", "--setup", "batch_size=2", "recipe.epochs=1", "--budget", "density=0.5",
                 "bits=8", "--set", "retrain={epochs=1, lr=0.01}",
                 "--results", str(tmp_path)]) == 0, capsys.readouterr().err
    (row,) = read_rows(tmp_path / "rows" / "own", print)
    assert row["setup"]["augment"] == "imagenet" and row["setup"]["batch_size"] == 2
    assert row["task"] == "imagenet:imagenet" and row["n_test"] == 4


@pytest.mark.parametrize("table, name", CHEAP)
def test_a_row_runs_at_full_resolution(place, tmp_path, capsys, table, name):
    assert main(["reproduce", str(CONFIGS / f"{table}.toml"), "--row", name, "--network", "torchvision:resnet18",
                 "--data-dir", str(place), "--checkpoint", str(place / "resnet18.pth"),
                 "--results", str(tmp_path)]) == 0, capsys.readouterr().err
    (row,) = read_rows(tmp_path / "rows" / table, print)
    # The published count of this network for 1,000 classes and pictures of 224 x 224; here the classifier has 2.
    assert row["dense_macs"] == 1_814_073_344 - 998 * 512 and row["n_test"] == 4
    assert row["checkpoint"]["source"] == "resnet18.pth" and str(place) not in str(dict(row))
    assert row["task"] == "imagenet" and row["network"] == "torchvision:resnet18"
