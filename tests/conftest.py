"""Shared by the tests: a tiny network, a task it can learn, a `Run` in memory, and fingerprints of models."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from methods.core.train.finetune import Recipe, train
from methods.core.train.task import Task

CLASSES, SHAPE = 4, (3, 8, 8)


@pytest.fixture(autouse=True)
def same_networks_every_time():
    """New layers and torch.randn draw the same numbers in every run of a test."""
    torch.manual_seed(0)


class TinyNet(nn.Module):
    """Three convolutions with batch norm, a residual add, both kinds of pooling, dropout and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn3, self.relu3 = nn.BatchNorm2d(12), nn.ReLU()
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool1(self.relu2(self.bn2(self.conv2(x)) + x))
        x = self.pool2(self.relu3(self.bn3(self.conv3(x))))
        return self.fc(self.drop(torch.flatten(x, 1)))


class TinyBatches:
    """Noisy pictures of `CLASSES` patterns, in batches of 24 that a generator shuffles."""

    def __init__(self, n: int, seed: int):
        patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
        noise = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(n) % CLASSES
        self.inputs = 0.6 * patterns[self.targets] + torch.randn(n, *SHAPE, generator=noise)

    def __len__(self):
        return -(-len(self.targets) // 24)

    def epoch(self, generator):
        n = len(self.targets)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for start in range(0, n, 24):
            chosen = order[start:start + 24]
            yield self.inputs[chosen], self.targets[chosen]


class Interrupted(Exception):
    """What a MemoryRun raises instead of going on."""


class MemoryRun:
    """A Run whose states lie in `states` as bytes; it raises Interrupted once `limit` calls have been answered."""

    def __init__(self, states: dict | None = None, limit: int | None = None, name: str = "", calls: list | None = None):
        self.states = {} if states is None else states
        self.limit, self.name, self.calls = limit, name, [] if calls is None else calls

    def _answer(self, what: str) -> None:
        if self.limit is not None and len(self.calls) >= self.limit:
            raise Interrupted(f"after {self.limit} calls, at {what}")
        self.calls.append((self.name, what))

    def report(self, step, total, **metrics):
        assert 1 <= step <= total and all(isinstance(value, float) for value in metrics.values())
        self._answer("report")

    def save(self, state):
        self._answer("save")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.states[self.name] = buffer.getvalue()

    def load(self):
        data = self.states.get(self.name)
        return None if data is None else torch.load(io.BytesIO(data), weights_only=True)

    def stage(self, name):
        return MemoryRun(self.states, self.limit, f"{self.name}/{name}", self.calls)


def make_task(**fields) -> Task:
    return Task(TinyBatches(96, 1), TinyBatches(48, 2), **fields)


def trained() -> TinyNet:
    """The tiny network after three epochs: about half of the held-out pictures are right (chance is a quarter)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        train(model, make_task(), Recipe(epochs=3, lr=0.01, optimizer="adam"), torch.Generator().manual_seed(0))
    return model


def fingerprint(model: nn.Module) -> dict:
    """Everything about a model that a caller could find changed."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "kinds": {name: type(module) for name, module in model.named_modules()},
        "rates": {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)},
        "grad": {name: (value.requires_grad, value.grad, value.device) for name, value in model.named_parameters()},
    }


def same(a, b) -> bool:
    """Equal nestings of dicts, sequences and tensors, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.fixture(scope="session")
def _trained_state():
    return trained().state_dict()


@pytest.fixture
def tiny(_trained_state):
    """net, model() (a fresh copy of the trained network), task(**fields), Run, Interrupted, fingerprint, same."""

    def model():
        copy = TinyNet()
        copy.load_state_dict(_trained_state)
        return copy.eval()

    return SimpleNamespace(net=TinyNet, model=model, task=make_task, Run=MemoryRun, Interrupted=Interrupted,
                           fingerprint=fingerprint, same=same, Batches=TinyBatches, shape=SHAPE)


@pytest.fixture
def run(capsys):
    """The command line: (exit code, what it printed, what it said on stderr)."""
    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err
    return run
