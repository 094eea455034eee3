"""A chain of prunable layers, a task for it, and settings that take no time."""

import torch
from torch import nn

from methods import sequential_reconstruction as sequential
from methods.core.train.recipe import Recipe
from methods.core.train.task import Task

NONE = Recipe(epochs=0, lr=0.01)
SMALL = sequential.Config(images=8, steps=2, image_size=8, ridge=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(width=8, **norm):
    """Three conv - BN - ReLU in a row and a classifier: the second layer of a pair is the first of the next."""
    torch.manual_seed(0)
    layers = [part for i in range(3) for part in (nn.Conv2d(width if i else 3, width, 3, padding=1),
                                                  nn.BatchNorm2d(width, **norm), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).eval()


def task(shape=(3, 8, 8)):
    batches = [(torch.rand(16, *shape, generator=seeded(i)), torch.arange(16) % 4) for i in range(2)]
    return Task.from_loader(batches, batches)
