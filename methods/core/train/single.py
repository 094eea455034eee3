"""A batch of one example in front of a batch norm that has no more than that one value of each channel."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigError
from .loaders import Batches, LoaderBatches


@contextlib.contextmanager
def watching_norms(model: nn.Module, batches: Batches) -> Iterator[None]:
    """ConfigError inside where a batch norm in training mode meets one value of each channel, which has no variance; in
    the first batch already where the loader tells that its last one will be of one example."""
    full = batch_before_single(batches)

    def look(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if norm.training and x.ndim > 1 and len(x) in (1, full) and x[:1].numel() == x.shape[1]:
            raise ConfigError("a batch of 1 example: batch norm needs 2 or more; allowed is drop_last=True or another "
                              "batch size")

    handles = [norm.register_forward_pre_hook(look) for norm in model.modules() if isinstance(norm, _BatchNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batch_before_single(batches: Batches) -> int | None:
    """The batch size of a DataLoader whose last batch will be of one example; None where it is not known to be."""
    loader = batches.loader if isinstance(batches, LoaderBatches) else None
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    size = loader.batch_size
    return size if size and not loader.drop_last and len(loader.sampler) % size == 1 else None
