"""Inputs, a chain of convolutions, and a short way to compress it, for the tests of SPARQ."""

import torch
from torch import nn

from methods import sparq
from methods.core.budget import Budget
from methods.core.train.task import Task
from methods.sparq import Config, QuantizedLayer, quantize_filters


class Inputs:
    """Calibration inputs as `Batches`."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 1

    def epoch(self, generator):
        yield self.inputs, torch.zeros(len(self.inputs), dtype=torch.int64)


def task_of(inputs):
    return Task(None, Inputs(inputs), calibration=Inputs(inputs))


def chain(channels=6, bias=False, groups=1):
    """conv - bn - relu - conv - bn - relu - conv - relu - flatten - linear; modules "0" to "8"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 4, 3, padding=1, bias=bias, groups=groups), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def draw(n, seed=3):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def compress(model, inputs, config=None, **budget):
    return sparq.compress(model, task_of(inputs), Budget(**budget), Config() if config is None else config,
                          torch.Generator())


def layer_of(bits=8, channels=3):
    conv = nn.Conv2d(channels, 2, 1, bias=False)
    return QuantizedLayer("conv", conv, quantize_filters(conv.weight, 8), bits)
