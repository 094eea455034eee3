"""The one place that imports torchvision, and only when data has to be downloaded or its networks are asked for."""

import contextlib
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from methods.core.errors import ConfigError

PATIENCE = 30.0  # seconds without a byte before a download counts as failed; torchvision waits for ever
AUXILIARY = ("googlenet", "inception_v3")  # networks with heads for training
_declared: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def import_datasets() -> ModuleType:
    """torchvision.datasets, also beside a torch that torchvision's compiled operators were not built for.

    torchvision registers fake kernels for two compiled operators at import, whether or not these were loaded.
    Where they were not (a CUDA build beside a CPU-only torch), their schemas are declared here first.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        from torchvision import datasets
    return datasets


def classifier_names() -> list[str]:
    """Of torchvision's classification networks."""
    import_datasets()
    from torchvision import models

    return models.list_models(module=models)


def classifier(name: str, classes: int) -> nn.Module:
    """torchvision's network for pictures of 3 channels, without the heads that only training uses."""
    import_datasets()
    from torchvision import models

    # With published weights these two undo the usual scaling of inputs for that of their first training.
    options = {"aux_logits": False, "init_weights": True, "transform_input": True} if name in AUXILIARY else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a later default of init_weights
            return models.get_model(name, weights=None, num_classes=classes, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"torchvision's {name} cannot be made: {str(error).splitlines()[0]}") from error


def download(name: str, folder: Path) -> dict[str, np.ndarray]:
    """CIFAR-10 or MNIST as published: {train_images, train_labels, test_images, test_labels}, all uint8.

    Raw files live in a temporary folder inside `folder`. Raises OSError, RuntimeError or ImportError where it
    fails.
    """
    datasets = import_datasets()
    kind = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}[name]
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as raw, _impatient():
        for part in ("train", "test"):
            published = kind(raw, train=part == "train", download=True)
            arrays[f"{part}_images"] = np.asarray(published.data, dtype=np.uint8)
            arrays[f"{part}_labels"] = np.asarray(published.targets, dtype=np.uint8)
    return arrays


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
