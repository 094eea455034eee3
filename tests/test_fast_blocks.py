"""Networks that are wired in unusual ways: the three integer networks agree, or refuse the layer in one line."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.fit import windows
from methods.core.fit.windows import find_window, keep_24
from methods.engine import windowed
from methods.engine.fast import FastNetwork
from methods.engine.verify import verify

from .test_fast import chain, check, compressed, normal, seeded


class Made(nn.Module):
    """A network from a function of (self, x) and layers, with a linear layer behind it."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.fc = nn.LazyLinear(2)

    def forward(self, x):
        return self.fc(torch.flatten(self.run(self, x), 1))


def doubled(m, x):
    y = m.a(x)
    return y + y


def preactivated(m, x):
    y = m.a(x)
    return m.c(torch.relu(m.b(torch.relu(y)))) + y


BLOCKS = {
    "a value added to itself": doubled,
    "a value read before and after its ReLU": preactivated,
    "one pixel added to all": lambda m, x: m.a(x) + m.b(F.adaptive_avg_pool2d(m.c(m.a2(x)), 1)),
    "all added to one pixel": lambda m, x: m.b(F.adaptive_avg_pool2d(m.c(m.a2(x)), 1)) + m.a(x),
    "average pools": lambda m, x: m.b(F.avg_pool2d(m.pool(m.a(x)), 3, 2)),
}
LAYERS = {"a": lambda: nn.Conv2d(3, 4, 1), "a2": lambda: nn.Conv2d(3, 4, 3), "b": lambda: nn.Conv2d(4, 4, 1),
          "c": lambda: nn.Conv2d(4, 4, 3, padding=1), "pool": lambda: nn.AvgPool2d(2, 1)}


@pytest.mark.parametrize("block", BLOCKS)
def test_unusual_blocks(block):
    x, run = normal(3, 3, 8, 8), BLOCKS[block]
    used = [name for name in LAYERS if name in (*run.__code__.co_names, *run.__code__.co_consts)]
    model = seeded(lambda: Made(run, **{name: LAYERS[name]() for name in used}))
    model(x)
    quick = check(model, compressed(model, x), x)
    verdict = verify(quick, [(x, None)], 3, 3)
    assert (verdict.wrong, verdict.reference_wrong, quick.float_nodes) == (0, 0, [])


def test_a_batch_norm_of_its_own_runs_in_float():
    x = normal(2, 3, 8, 8)
    model = chain(lambda: nn.Conv2d(3, 4, 3), nn.ReLU, lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 4, 1), x=x)
    quick = check(model, compressed(model, x), x)
    assert quick.float_nodes == ["2"] and verify(quick, [(x, None)], 2, 1).reference_wrong == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 5, 8)])
def test_linear_layers_take_rows_of_vectors(shape):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), normal(*shape)
    check(model, compressed(model, x), x)


@pytest.mark.parametrize("option", ["5opt", "2opt", "6opt"])
@pytest.mark.parametrize("into, sparse24", [(8, False), (5, False), (8, True), (5, True)])
def test_the_reference_has_windows_of_its_own(option, into, sparse24, monkeypatch):
    """All three networks agree, and the reference notices other tables than the definition's."""
    x = normal(2, 3, 8, 8)
    model = chain(lambda: nn.Conv2d(3, into, 3), nn.ReLU, lambda: nn.Conv2d(into, 4, 3, 2, padding=1), x=x)
    if sparse24:
        model[2].weight.data *= keep_24(model[2].weight)
    parts = dataclasses.replace(compressed(model, x), windows={"2": find_window(option, sparse24=sparse24)})
    check(model, parts, x)
    monkeypatch.setattr(windows, "partner_table", lambda window: torch.zeros(256, 256, dtype=torch.uint8))
    monkeypatch.setattr(windowed, "pair_table", lambda window: torch.zeros(1 << 16, dtype=torch.int16))
    assert verify(FastNetwork(parts, model), [(x, None)], 2, 2).reference_wrong > 0
