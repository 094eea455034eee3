"""Width search: what it refuses, in one line, before a network is judged."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods import Budget, ConfigError, Recipe, Task, pipeline, width_search
from methods.core.errors import BudgetError, CompressError
from methods.width_search import Config, Inner

from .test_width_search import compress, seeded

REFUSED = [
    ({"bits": 8}, {}, BudgetError, "needs the budget field 'mac_ratio' or 'bop_ratio' or 'size_ratio'"),
    ({"mac_ratio": 0.1, "bits": 8}, {}, BudgetError, r"mac_ratio = 0.1 .* the smallest network .* takes 0\.\d+$"),
    ({"bop_ratio": 0.001, "bits": 8}, {}, BudgetError, r"bop_ratio = 0.001 .* takes 0\.\d+$"),
    ({"size_ratio": 0.01, "bits": 8}, {}, BudgetError, r"size_ratio = 0.01 .* takes 0\.\d+$"),
    ({"bop_ratio": 0.1}, {}, BudgetError, "bop_ratio counts the bits of weights"),
    ({"mac_ratio": 0.5, "bits": 8}, {"bits": (2, 4)}, BudgetError, "are searched: leave out the budget field 'bits'"),
    ({"mac_ratio": 0.5}, {}, BudgetError, "pipeline needs the budget field 'bits'"),
    ({"mac_ratio": 0.5, "bits": 8, "density": 0.5}, {}, BudgetError, "pipeline cannot honour .*'density'"),
    ({"mac_ratio": 0.5, "bits": {"*": 8, "conv1": None, "fc": None}}, {}, BudgetError, "cannot leave all of these"),
    ({"mac_ratio": 0.5, "bits": 8}, {"multiple": 16}, ConfigError, "multiple = 16: no layer .* have 8, 12 channels"),
    ({"mac_ratio": 0.5, "bits": 8}, {"strategy": "best"}, ConfigError, "strategy = 'best': allowed are random"),
    ({"mac_ratio": 0.5, "bits": 8}, {"strategy": "greedy"}, ConfigError, "evaluations = 4 does nothing"),
    ({"mac_ratio": 0.5, "bits": 8}, {"bits": (4,)}, ConfigError, "bits = .4.: allowed are two or more"),
    ({"mac_ratio": 0.5, "bits": 8}, {"bits": (4, 9)}, ConfigError, "bits = .4, 9.: allowed are"),
    ({"size_ratio": 0.01}, {"inner": Inner("rptq", size_ratio=0.5)}, BudgetError, r"size_ratio = 0.01 .* takes 0\.\d"),
    ({"mac_ratio": 0.5, "bits": 8}, {"inner": Inner("sparq", size_ratio=0.1)}, BudgetError, "size_ratio chooses bits"),
    ({"mac_ratio": 0.5}, {"inner": Inner("rptq", size_ratio=0.001)}, BudgetError, "allowed are numbers of 0"),
    ({"mac_ratio": 0.5, "bits": 8}, {"criterion": "slim"}, ConfigError, "criterion = 'slim': allowed are l1"),
]


@pytest.mark.parametrize("budget, settings, kind, words", REFUSED)
def test_refused_in_one_line_before_anything_is_judged(budget, settings, kind, words, tiny, monkeypatch):
    monkeypatch.setattr(Task, "error", None)
    with pytest.raises(kind) as caught:
        compress(tiny, budget, **settings)
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)


def test_refused_with_what_it_is_given(tiny):
    with pytest.raises(ConfigError, match="task = None: with these settings width_search needs a task"):
        width_search.compress(tiny.model(), None, Budget(mac_ratio=0.5, bits=8), Config(recipe=None), seeded())
    with pytest.raises(ConfigError, match="no training batches"):
        compress(tiny, {"mac_ratio": 0.5, "bits": 8}, task=tiny.task().seen_as("held_out"), recipe=Recipe(1, 0.1))
    with pytest.raises(ConfigError, match="no training batches"):
        compress(tiny, {"mac_ratio": 0.5, "bits": 8}, task=tiny.task().seen_as("held_out"), criterion="taylor")
    with pytest.raises(ConfigError, match="nothing to judge networks on"):
        compress(tiny, {"mac_ratio": 0.5, "bits": 8}, task=replace(tiny.task(), held_out=tiny.Batches(0, 1)))
    with pytest.raises(ConfigError, match="allowed is any other method"):
        Inner("width_search")
    with pytest.raises(ConfigError, match="inner.config is .*pipeline.* needed is that of rptq"):
        Inner("rptq", pipeline.Config())
    with pytest.raises(CompressError, match="no layer of which channels could go"):
        compress(tiny, {"mac_ratio": 0.5, "bits": 8}, nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 1))
    batch = torch.randn(8, 3, 8, 8), torch.randn(8, 1)
    task = Task.from_loader([batch], [batch], loss=nn.functional.mse_loss)
    with pytest.raises(ConfigError, match="slimmable teaches .* class probabilities: .* not float32 .2, 1"):
        compress(tiny, {"mac_ratio": 0.5, "bits": 8}, net, task=task, slimmable=Recipe(1, 0.1))


def test_the_size_of_a_file_is_a_share():
    for size in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match=f"inner.size_ratio = {size}: allowed is"):
            Inner("rptq", size_ratio=size)
