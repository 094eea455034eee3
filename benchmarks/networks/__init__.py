"""The benchmark networks by name, each with the input it takes and the input scaling of its paper.

torchvision:NAME is torchvision's own network, for its published weights, given as a file with --checkpoint.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.core.errors import ConfigError

from .. import _torchvision
from ..data import Dataset
from ..imagenet import SCALING as IMAGENET  # of all weights that torchvision publishes
from ..sources import Scaling
from . import lenet, resnet, vgg

OWN = ".py:"  # in the name of a network of one's own
PIXEL_256: Scaling = ((0.0,), (256 / 255,))  # Caffe: pixel / 256
PIXEL_255: Scaling = ((0.0,), (1.0,))
TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Network:
    """What the registry knows of a network.

    make      (classes, channels) -> module
    size      height and width of the images it takes, or None for any
    channels  channels of the images it takes, or None for any
    scaling   (mean, std) of its inputs on the 0..1 scale, or None for the data set's own
    renamed   ((pattern, replacement), ...) for the names of tensors in a checkpoint; what becomes "" is passed over
    """

    make: Callable[[int, int], nn.Module]
    size: int | None = None
    channels: int | None = None
    scaling: Scaling | None = None
    renamed: tuple[tuple[str, str], ...] = ()


# Heads that only training uses; torchvision published DenseNets with a dot inside names that has no place today.
PUBLISHED_NAMES = ((r"(aux1|aux2|AuxLogits)\..*", ""),
                   (r"(.*\.denselayer\d+\.(?:norm|conv))\.([12]\.\w+)", r"\1\2"))

NETWORKS: dict[str, Network] = {
    "resnet18": Network(lambda classes, channels: resnet.resnet18(classes, channels, 64)),
    "resnet20": Network(lambda classes, channels: resnet.thin(3, classes, channels)),
    "resnet56": Network(lambda classes, channels: resnet.thin(9, classes, channels)),
    "vgg16": Network(vgg.VGG16, size=32),
    "vgg7": Network(vgg.VGG7, size=32),
    "lenet300": Network(lenet.LeNet300, 28, 1, PIXEL_256),
    "lenet5_caffe": Network(lenet.LeNet5Caffe, 28, 1, PIXEL_256),
    "lenet5_caffe_relu": Network(lenet.lenet5_caffe_relu, 28, 1, PIXEL_255),
    "lenet5_bb": Network(lenet.lenet5_bayesian_bits, 28, 1, PIXEL_255),
}


def network_names() -> list[str]:
    """Every name, `resnet18wN` for the family of widths (N = channels of the first stage), and torchvision's."""
    return [*NETWORKS, "resnet18wN", f"{TORCHVISION}NAME"]


def find(name: str) -> Network:
    """The network called `name`; ConfigError, listing the names, if there is none."""
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith(TORCHVISION):
        return _of_torchvision(name.removeprefix(TORCHVISION))
    if OWN in name:
        return _from_file(name)
    wide = re.fullmatch(r"resnet18w([1-9]\d{0,3})", name)
    if wide is None:
        raise ConfigError(f"unknown network {name!r}; there are: {', '.join(network_names())}")
    width = int(wide[1])
    return Network(lambda classes, channels: resnet.resnet18(classes, channels, width))


def _of_torchvision(name: str) -> Network:
    if name not in _torchvision.classifier_names():
        raise ConfigError(f"unknown network {TORCHVISION + name!r}; torchvision has: "
                          f"{', '.join(_torchvision.classifier_names())}")
    return Network(lambda classes, channels: _torchvision.classifier(name, classes), channels=3, scaling=IMAGENET,
                   renamed=PUBLISHED_NAMES)


def named(network: Network, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that the network has for them."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in network.renamed:
            name = re.sub(f"^{pattern}$", replacement, name)
        found[name] = tensor
    return {name: tensor for name, tensor in found.items() if name}


def label(name: str) -> str:
    """How a row calls a network: one of a file without its folder."""
    return f"{Path(name.rpartition(':')[0]).name}:{name.rpartition(':')[2]}" if OWN in name else name


def source_digest(name: str) -> str | None:
    """Of the file of a network of one's own; None for the others."""
    path = Path(name.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if OWN in name and path.is_file() else None


def _from_file(name: str) -> Network:
    """FILE.py:FUNCTION, a function (classes, channels) -> module; its attributes `size`, `channels` and `scaling`,
    where it has them, say which pictures it takes and how they are scaled (see `Network`)."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"network {name!r}: there is no file {path}")
    found = importlib.util.spec_from_file_location(f"own_network_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - a user's file raises whatever it likes
        raise ConfigError(f"network {name!r}: {path} cannot be imported: {type(error).__name__}: "
                          f"{' '.join(str(error).split())}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ConfigError(f"network {name!r}: {path} has no function {function!r}")
    return Network(make, *(getattr(make, part, None) for part in ("size", "channels", "scaling")))


def build(name: str, classes: int, channels: int, seed: int = 0) -> nn.Module:
    """A freshly initialised network; equal seeds give equal weights, torch's global generator is left alone.

    Raises ConfigError for an unknown name, fewer than 2 classes, or channels that the network does not take.
    """
    network = find(name)
    if classes < 2:
        raise ConfigError(f"classes = {classes}: a network needs 2 or more")
    if channels < 1 or network.channels not in (None, channels):
        allowed = "1 or more" if network.channels is None else str(network.channels)
        raise ConfigError(f"channels = {channels}: network {name} takes {allowed}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators too
        made = network.make(classes, channels)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"network {name!r} made {type(made).__name__}; needed is a torch.nn.Module")
    return made


def check_fits(name: str, dataset: Dataset) -> None:
    """Raise ConfigError if the network `name` does not take the images of `dataset`."""
    network = find(name)
    if not _takes(network, dataset):
        want = _spelled((network.size, network.size, network.channels))
        fitting = ", ".join(other for other in NETWORKS if _takes(NETWORKS[other], dataset))
        raise ConfigError(f"network {name} takes images of {want}, but those of {dataset.name} are "
                          f"{_spelled(dataset.image_shape)}; what takes them: {fitting}, resnet18wN")


def _takes(network: Network, dataset: Dataset) -> bool:
    height, width, channels = dataset.image_shape
    wants = ((network.size, height), (network.size, width), (network.channels, channels))
    return all(want in (None, given) for want, given in wants)


def _spelled(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if length is None else str(length) for length in shape)
