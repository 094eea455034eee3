"""torchvision's networks as starts: its published files of weights, made here with random numbers."""

import importlib

import pytest
import torch

from benchmarks import _torchvision, networks
from benchmarks.baselines import load_baseline, shipped_path, skeleton
from benchmarks.data import open_dataset
from methods.core.errors import ConfigError

_torchvision.import_datasets()
models = importlib.import_module("torchvision.models")


@pytest.fixture
def dataset(tmp_path):
    """Two classes of pictures of 32 x 32."""
    from PIL import Image

    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32), (100 * label + i, 7 * i, 40)).save(tmp_path / "pets" / name / f"{i}.png")
    return open_dataset(f"folder:{tmp_path / 'pets'}")


def saved(model, path):
    torch.save(model.state_dict(), path)
    return path


def test_a_file_of_torchvisions_weights_is_a_start(dataset, tmp_path):
    theirs = models.resnet18(num_classes=2).eval()
    found = load_baseline(dataset, "torchvision:resnet18", saved(theirs, tmp_path / "resnet18-f37072fd.pth"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.model(x), theirs(x)) and not found.model.training
    assert found.source == "resnet18-f37072fd.pth"


def test_its_inputs_are_scaled_as_torchvision_scales_them(dataset):
    from torchvision.transforms import functional

    found = next(networks_batches(dataset))[0][0]
    picture = dataset.test.images[0].permute(2, 0, 1)
    published = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    wanted = functional.normalize(picture / 255, published.mean, published.std)
    assert torch.allclose(found, wanted, atol=1e-5)


def networks_batches(dataset):
    from benchmarks.data import test_batches

    return test_batches(dataset, batch_size=2, device="cpu",
                        scaling=networks.find("torchvision:resnet18").scaling).epoch(None)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_heads_for_training_in_a_published_file_are_passed_over(dataset, tmp_path, name):
    """torchvision itself makes such a network with them, loads the file, and drops them."""
    theirs = getattr(models, name)(num_classes=2, aux_logits=True, transform_input=True,
                                               init_weights=False).eval()
    found = load_baseline(dataset, f"torchvision:{name}", saved(theirs, tmp_path / "weights.pth"))
    x = torch.randn(1, 3, 96, 96)
    assert torch.allclose(found.model(x), theirs(x), atol=1e-6)


def test_densenets_published_names_are_read(dataset, tmp_path):
    theirs = models.densenet121(num_classes=2).eval()
    old = {name.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1")
           .replace("conv2", "conv.2") if "denselayer" in name else name: tensor
           for name, tensor in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert any(".norm.1." in name for name in old)
    torch.save(old, tmp_path / "densenet121-a639ec97.pth")
    found = load_baseline(dataset, "torchvision:densenet121", tmp_path / "densenet121-a639ec97.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found.model(x), theirs(x))


def test_weights_for_other_classes_are_refused_in_one_line(dataset, tmp_path):
    path = saved(models.resnet18(num_classes=3), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"fc.weight \[3, 512\] instead of \[2, 512\]") as error:
        load_baseline(dataset, "torchvision:resnet18", path)
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_torchvisions(dataset):
    with pytest.raises(ConfigError, match="'torchvision:resnet19'; torchvision has: alexnet, ") as error:
        networks.find("torchvision:resnet19")
    assert "fasterrcnn" not in str(error.value) and "fcn_resnet50" not in str(error.value)


def test_grey_pictures_do_not_fit_and_equal_seeds_give_equal_weights(dataset):
    with pytest.raises(ConfigError, match="takes images of any x any x 3"):
        skeleton(open_dataset("digits"), "torchvision:resnet18")
    one, two = (networks.build("torchvision:squeezenet1_1", 2, 3, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_files_of_its_rows_have_plain_names():
    assert shipped_path("folder:pets", "torchvision:resnet18").name == "folder-pets_torchvision-resnet18.safetensors"
