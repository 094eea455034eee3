"""What the lessons share: the digits as a task, a small network, and its training."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from methods import Recipe, Task, train

from ..data import Dataset, make_task, open_dataset, test_batches
from ..measure import right_of, top1_of


@cache
def digits() -> Dataset:
    """8 x 8 pixels, 1,293 to train on, 144 held out, 360 to test on."""
    return open_dataset("digits")


def digits_task() -> Task:
    return make_task(digits(), batch_size=64, device=torch.device("cpu"))


def convnet(seed: int = 0) -> nn.Module:
    """Two convolutions, two linear layers: 33,000 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                             nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 56), nn.ReLU(), nn.Linear(56, 10))


@cache
def trained_state(epochs: int = 8) -> dict[str, torch.Tensor]:
    network = convnet()
    train(network, digits_task(), Recipe(epochs, 0.05), torch.Generator().manual_seed(0))
    return network.state_dict()


def trained() -> nn.Module:
    """`convnet`, trained for eight epochs."""
    network = convnet()
    network.load_state_dict(trained_state())
    return network.eval()


def accuracy(network: Callable) -> float:
    """Percent of the test digits."""
    return top1_of(right_of([network], test_batches(digits(), batch_size=360, device="cpu").epoch(None))[0])
